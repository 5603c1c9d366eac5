"""Where the compared subjects run: most in this environment, some in one of their own."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from benchmarks._servers import Server
from benchmarks._settings import Settings
from benchmarks._subject import Subject

ROOT = Path(__file__).resolve().parents[1]
HERE = "bench"

_VERSIONS = """
import importlib.metadata, sys
print(*(f"{name} {importlib.metadata.version(name)}" for name in sys.argv[1:]), sep=", ")
"""


class CannotRun(Exception):
    """Why a subject cannot run, in one line."""


@cache
def python_of(environment: str) -> str:
    """Return the Python of *environment*, which is set up if it is not there yet."""
    if environment == HERE:
        return sys.executable
    home = ROOT / ".venv" / environment
    if not (home / "ready").exists():
        command = ["sh", "scripts/environment.sh", environment]
        made = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable},
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise CannotRun(f"its environment cannot be set up: {last_line(made.stderr)}")
    return str(home / "bin" / "python")


def serve(subject: Subject, settings: Settings) -> Server:
    """Return the server of *subject*."""
    return Server(
        subject.name, settings, python=python_of(subject.environment), program="benchmarks._serve"
    )


def versions(subject: Subject) -> str:
    """Return the versions of what *subject* is made of, as its environment has them."""
    command = [python_of(subject.environment), "-c", _VERSIONS, *subject.packages]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    if told.returncode:
        raise CannotRun(last_line(told.stderr))
    return told.stdout.strip()


def why(error: Exception) -> str:
    """Return in one line why a subject did not start, answer or end."""
    said = getattr(error, "log", None) or getattr(error, "stderr", None) or str(error)
    return last_line(said)


def last_line(text: str) -> str:
    """Return the last line of a traceback or log that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line and not line.startswith((" ", "\t"))]
    chosen = said or lines or ["no message"]
    return chosen[-1].strip()[:160]
