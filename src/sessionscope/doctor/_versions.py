"""Versions that are known to be bad, each with its source."""

import re
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from sessionscope.doctor._line import Line, line

Version = tuple[int, ...]


class _Bad(NamedTuple):
    what: str
    is_bad: Callable[[Version], bool]
    why: str


# SQLite's fix of 3.51.3 is in 3.50.7 and 3.44.6 as well (https://sqlite.org/wal.html#walresetbug).
_WAL_RESET_FIXED = ((3, 44, 6), (3, 50, 7), (3, 51, 3))


def _has_wal_reset_bug(version: Version) -> bool:
    is_mended = any(version >= fixed and version[:2] == fixed[:2] for fixed in _WAL_RESET_FIXED)
    return version < _WAL_RESET_FIXED[-1] and not is_mended


def _between(first: Version, good: Version) -> Callable[[Version], bool]:
    """Return whether a version is *first* or later, and before the one that is *good* again."""

    def is_bad(version: Version) -> bool:
        return first <= version < good

    return is_bad


_SERVERS = [
    _Bad(
        "sqlite",
        _has_wal_reset_bug,
        "several processes that write one WAL file at once may, very rarely, damage it "
        "(https://sqlite.org/wal.html#walresetbug): update to 3.51.3 or newer",
    ),
    _Bad(
        "postgresql",
        _between((14,), (14, 4)),
        "CREATE INDEX CONCURRENTLY may leave rows out "
        "(https://www.postgresql.org/docs/release/14.4/): update to the newest 14.x",
    ),
    _Bad(
        "postgresql",
        _between((), (14,)),
        "it gets no more fixes (https://www.postgresql.org/support/versioning/): update",
    ),
]
_PACKAGES = [
    _Bad(
        "fastapi",
        _between((), (0, 121, 1)),
        'Depends(scope="function") does not end before the response there '
        "(https://fastapi.tiangolo.com/release-notes/): update to 0.121.1 or newer",
    ),
]
_DRIVERS = ("SQLAlchemy", "psycopg", "psycopg2", "asyncpg", "aiosqlite", "PyMySQL", "asyncmy")


def server_version(server: str, told: str) -> Line:
    """Return the line for a server that has *told* its version."""
    found = parse(told)
    why = next((bad.why for bad in _SERVERS if bad.what == server and bad.is_bad(found)), "")
    return line("version", told, note=bool(why), mend=_sentence(why))


def packages() -> Iterator[Line]:
    """Yield a line for all drivers, and one for each package that is known to be bad."""
    present = [f"{name} {found}" for name in _DRIVERS if (found := _installed(name))]
    yield line("packages", ", ".join(present))
    for bad in _PACKAGES:
        found = _installed(bad.what)
        if found and bad.is_bad(parse(found)):
            yield line(bad.what, found, bad=True, mend=_sentence(bad.why))


def parse(told: str) -> Version:
    """Return the numbers at the beginning of a version."""
    numbers = re.match(r"\d+(?:\.\d+)*", told)
    return tuple(int(number) for number in numbers[0].split(".")) if numbers else ()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sentence(why: str) -> str:
    return why[:1].upper() + why[1:]
