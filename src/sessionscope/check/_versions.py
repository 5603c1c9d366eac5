"""Which version of FastAPI a project runs on: its lock file, its requirements, else installed."""

import re
import sys
from pathlib import Path
from typing import NamedTuple


class Version(NamedTuple):
    """A version of FastAPI: one that the project names, or what is installed here."""

    numbers: tuple[int, ...]
    is_named: bool = True

    def __str__(self) -> str:
        return ".".join(map(str, self.numbers))


_LOCK = re.compile(r'name = "fastapi"\s+version = "([\d.]+)')
_NAME = r"""(?im)(?:^\s*|["'])fastapi(?![\w-])(?:\[[\w,\s-]*\])?\s*"""
_PIN = re.compile(_NAME + r"(?:==|~=)\s*([\d.]+)")
# Poetry's table: a caret keeps a version 0.x to its minor version.
_POETRY = re.compile(r"""(?m)^fastapi\s*=\s*(?:\{.*?version\s*=\s*)?["'][\^~=\s]*([\d.]+)["']""")
_BOUND = re.compile(_NAME + r"""(?:=\s*["'])?[^\n#;"']*?<(=?)\s*([\d.]+)""")


def fastapi_version(folder: Path) -> Version | None:
    """Return the version that the project at *folder* uses; None if nothing tells."""
    for place in [folder, *list(folder.parents)[:3]]:
        found = _declared(place)
        if found is not None:
            return found
        if (place / ".git").exists():
            break
    return _installed()


def _installed() -> Version | None:
    """Look for FastAPI's metadata; importlib.metadata takes longer than a run from the cache."""
    for folder in sys.path:
        for found in Path(folder).glob("fastapi-*.dist-info"):
            numbers = _numbers(found.name.removeprefix("fastapi-"))
            return Version(numbers, is_named=False)
    return None


def _declared(folder: Path) -> Version | None:
    locks = [folder / "uv.lock", folder / "poetry.lock", folder / "pdm.lock"]
    plain = [*sorted(folder.glob("requirements*.txt")), *sorted(folder.glob("requirements/*.txt"))]
    project = folder / "pyproject.toml"
    named = ((_LOCK, locks), (_PIN, [*plain, project]), (_POETRY, [project]))
    for pattern, paths in named:
        for path in paths:
            found = pattern.search(_text(path))
            if found:
                return Version(_numbers(found[1]))
    for path in (*plain, project):
        found = _BOUND.search(_text(path))
        if found:
            below = _below(_numbers(found[2]), inclusive=bool(found[1]))
            return Version(below) if below is not None else None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _below(bound: tuple[int, ...], *, inclusive: bool) -> tuple[int, ...] | None:
    """The newest version under an upper bound, as far as it can be told."""
    if inclusive or len(bound) < 2:
        return bound if inclusive else None
    return (*bound[:-1], bound[-1] - 1) if bound[-1] else (bound[0], max(bound[1] - 1, 0))
