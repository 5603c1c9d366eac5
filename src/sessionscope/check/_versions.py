"""Which version of FastAPI a project runs on: its lock file, its requirements, else installed."""

import re
import sys
from pathlib import Path

Version = tuple[int, ...]

_LOCK = re.compile(r'name = "fastapi"\s+version = "([\d.]+)')
_PIN = re.compile(r"""(?im)^\s*["']?fastapi(?:\[[\w,\s-]*\])?\s*(?:==|~=)\s*([\d.]+)""")
_BOUND = re.compile(r"""(?im)["']?fastapi(?:\[[\w,\s-]*\])?[^\n#]*?<(=?)\s*([\d.]+)""")


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
            return _numbers(found.name.removeprefix("fastapi-"))
    return None


def _declared(folder: Path) -> Version | None:
    locks = [folder / "uv.lock", folder / "poetry.lock", folder / "pdm.lock"]
    plain = [*sorted(folder.glob("requirements*.txt")), *sorted(folder.glob("requirements/*.txt"))]
    for pattern, paths in ((_LOCK, locks), (_PIN, [*plain, folder / "pyproject.toml"])):
        for path in paths:
            found = pattern.search(_text(path))
            if found:
                return _numbers(found[1])
    for path in (*plain, folder / "pyproject.toml"):
        found = _BOUND.search(_text(path))
        if found:
            return _below(_numbers(found[2]), inclusive=bool(found[1]))
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def _below(bound: Version, *, inclusive: bool) -> Version | None:
    """The newest version under an upper bound, as far as it can be told."""
    if inclusive or len(bound) < 2:
        return bound if inclusive else None
    return (*bound[:-1], bound[-1] - 1) if bound[-1] else (bound[0], max(bound[1] - 1, 0))
