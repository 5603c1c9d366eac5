"""How fast the checker is: beside parsing alone, beside ruff, and from its cache.

It checks a copy of installed packages, since the project itself is too small to measure.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks._report import Figure, Report, Spread, Table

PACKAGES = ("sqlalchemy", "fastapi", "starlette", "hypothesis", "mypy", "libcst", "anyio")
SOURCE = Path(__file__).parents[1] / "src"
# Each in a fresh process: what one leaves in memory is not another's.
PARSE = """
import ast, gc, json, pathlib, sys, time, warnings
warnings.simplefilter("ignore")
gc.disable()
sources = [path.read_bytes() for path in sorted(pathlib.Path(".").rglob("*.py"))]
start = time.process_time()
for source in sources:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        pass
seconds = time.process_time() - start
del sources, source
"""
CHECK = """
import gc, json, pathlib, resource, time
from sessionscope.check._config import Config
from sessionscope.check._files import discover
from sessionscope.check._run import run
gc.disable()
start = time.process_time()
report = run(discover(["."], (), []), Config(select=("SES",)))
checked = time.process_time() - start
lines = report.lines
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([lines / seconds, lines / checked, memory, lines]))
"""


def run(*, short: bool) -> Report:
    """Measure over *PACKAGES*; with *short*, over one of them and once."""
    rounds = 1 if short else 5
    with tempfile.TemporaryDirectory() as folder:
        for name in PACKAGES[:1] if short else PACKAGES:
            _copy(name, Path(folder))
        cold = [_cold(folder) for _ in range(rounds)]
        _warm(folder)
        warm = Spread.of(_warm(folder) for _ in range(rounds))
        ruff = Spread.of(_ruff(folder) for _ in range(rounds))
    return _report(cold, warm, ruff)


def _copy(name: str, folder: Path) -> None:
    found = find_spec(name)
    for place in found.submodule_search_locations or () if found else ():
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
        shutil.copytree(place, folder / name, ignore=ignored)


def _cold(folder: str) -> tuple[float, float, float, float]:
    command = [sys.executable, "-c", PARSE + CHECK]
    done = subprocess.run(
        command, cwd=folder, env=_environment(), check=True, capture_output=True, text=True
    )
    parsed, checked, memory, lines = json.loads(done.stdout)
    return parsed, checked, memory, lines


def _warm(folder: str) -> float:
    return _seconds([sys.executable, "-m", "sessionscope", "check", "."], folder)


def _ruff(folder: str) -> float:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "-q", "."]
    return _seconds(command, folder)


def _seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=_environment(), check=False, capture_output=True)
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE)}


def _report(cold: list[tuple[float, float, float, float]], warm: Spread, ruff: Spread) -> Report:
    report = Report("checker: lines per processor second, all rules, one process")
    ratio = Spread.of(checked / parsed for parsed, checked, _, _ in cold)
    memory = max(memory for _, _, memory, _ in cold)
    report.figures.extend(
        [
            Figure("cold, beside ast.parse alone", ratio.median, at_least=0.33),
            Figure("with a warm cache", warm.median, "s", at_most=0.3),
            Figure("peak memory of the process", memory, "MB"),
        ]
    )
    rows = [
        ["lines", f"{cold[0][3]:.0f}"],
        ["ast.parse, thousand lines per s", str(Spread.of(c[0] / 1000 for c in cold))],
        ["check, thousand lines per s", str(Spread.of(c[1] / 1000 for c in cold))],
        ["check from the cache, s", str(warm)],
        ["ruff check, two cores and no cache, s", str(ruff)],
    ]
    report.tables.append(Table("checker", ["what", "median (lowest-highest)"], rows))
    return report
