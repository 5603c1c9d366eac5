"""Counting the instructions of parts of a program, under callgrind."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def count(program: Sequence[str], parts: int) -> list[int]:
    """Return the instructions of each of a program's *parts*, which `getppid` begins and ends."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder, "profile")
        command = [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}"),
            *("--dump-before=getppid", *program),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        subprocess.run(command, check=True, capture_output=True, env=environment, text=True)
        # Parts alternate: what led up to one, the part itself, what led up to the next.
        return [_total(profile.with_name(f"profile.{2 * n + 2}")) for n in range(parts)]


def _total(profile: Path) -> int:
    found = re.search(r"^totals: (\d+)$", profile.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
