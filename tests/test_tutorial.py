"""The tutorial is true: it is read from its top to its end, and what it says to do is done."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.documents import ROOT, Block, blocks_of, loaded
from tests.plugin import PLUGIN

PAGE = ROOT / "docs" / "tutorial.md"
# The commands that a network is needed for: `make init-test` runs what they lead to.
INSTALL = {"python3 -m venv .tools", ".tools/bin/pip install ~/src/sessionscope"}
AGAIN = ["app/models.py", "app/schemas.py", "app/main.py"]
PLUGINS = [*PLUGIN, "-p", "no:asyncio", "-p", "no:cacheprovider"]
# What `make run` serves, without a server.
SERVE = (
    "from fastapi.testclient import TestClient\n"
    "from app.main import app\n"
    "with TestClient(app) as client:\n"
    "    assert client.get('/health').json() == {'status': 'ok'}\n"
)


class Reader:
    """Somebody who follows the page, in a folder of their own."""

    def __init__(self, folder: Path, postgres_url: str) -> None:
        self.folder = folder
        self.postgres_url = postgres_url
        self.environment = {k: v for k, v in os.environ.items() if k != "DATABASE_URL"}
        self.environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT / "src"), *filter(None, sys.path)]
        )
        self.written: set[Path] = set()
        self.commands: list[str] = []

    def follow(self, block: Block) -> None:
        """Do what a block of the page says."""
        if block.language == "console":
            for command, output in commands(block.text):
                self.type(command, output)
        else:
            act = {"python": self.write, "diff": self.change}[block.language]
            act(block.text)

    def write(self, text: str) -> None:
        """Write a file, or what comes at the end of one."""
        first, _, code = text.partition("\n")
        name, _, where = first.removeprefix("# ").partition(", ")
        path = self.folder / name
        assert where in ("", "at the end"), first
        assert path.exists() == bool(where), f"{name} is there already, or is not there yet"
        path.write_text(path.read_text("utf-8") + code if where else code, "utf-8")
        self.written.add(path)

    def change(self, text: str) -> None:
        """Change the lines of a file that a diff names."""
        first, _, lines = text.partition("\n")
        path = self.folder / first.removeprefix(" # ")
        sides = (
            "".join(line[1:] for line in lines.splitlines(True) if line[0] in f" {side}")
            for side in "-+"
        )
        old, new = sides
        whole = path.read_text("utf-8")
        assert whole.count(old) == 1, f"{path.name} has no such lines, or has them twice:\n{old}"
        path.write_text(whole.replace(old, new), "utf-8")

    def type(self, command: str, expected: str) -> None:
        """Run a command, and compare what it prints."""
        self.commands.append(command)
        if command in INSTALL:
            return
        program, _, argument = command.partition(" ")
        if program == "cd":
            self.folder = (self.folder / argument).resolve()
        elif program in ("export", "unset"):
            name, _, _ = argument.partition("=")
            self.environment.pop(name, None)
            if program == "export":
                self.environment[name] = self.postgres_url
        elif command == "make test":
            assert f"{expected.strip()} in" in self.run_python("-m", "pytest", "-q", *PLUGINS)
        elif command == "make run":
            self.run_python("-m", "alembic", "upgrade", "head")
            self.run_python("-c", SERVE)
        elif command.startswith("make migration NAME="):
            self.run_python("-m", "alembic", "upgrade", "head")
            self.leave_new_migrations_as_they_are()
            revise = ("revision", "--autogenerate", "-m", argument.partition('"')[2].rstrip('"'))
            self.run_python("-m", "alembic", *revise)
        elif program.endswith("sessionscope"):
            assert self.run_python("-m", "sessionscope", *argument.split()).startswith(
                expected.strip()
            )
        elif program == ".venv/bin/python":
            printed = self.run_python(*argument.split())
            assert printed == expected or argument.startswith("-m ")
        else:
            raise AssertionError(f"nobody knows how to do this: {command}")

    def leave_new_migrations_as_they_are(self) -> None:
        """Do without ruff, which formats them: the project's own environment has it."""
        settings = self.folder / "alembic.ini"
        settings.write_text(settings.read_text("utf-8").partition("[post_write_hooks]")[0], "utf-8")

    def run_python(self, *command: str) -> str:
        """Run Python in the project, with warnings as errors."""
        finished = subprocess.run(
            [sys.executable, "-W", "error", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


def commands(text: str) -> list[tuple[str, str]]:
    """Return the commands of a console, each with what it prints."""
    typed = re.split(r"(?m)^\$ ", text)
    assert typed[0] == "", "a console begins with a command"
    return [
        (command, output) for command, _, output in (each.partition("\n") for each in typed[1:])
    ]


def test_the_tutorial_is_true(
    tmp_path: Path, emptied_postgres_url: str, record_property: Callable[[str, object], None]
) -> None:
    reader = Reader(tmp_path, emptied_postgres_url)
    repeated: list[Block] = []
    for block in blocks_of(PAGE):
        if block.language in ("python", "diff"):
            repeated += [block] if block.text[1:].lstrip("# ").startswith(tuple(AGAIN)) else []
        reader.follow(block)
        if "init --async" in block.text:
            copy_and_repeat(reader, repeated)
    files = {path.stem for path in reader.written}
    ran = {
        name for folder in (tmp_path / "till", tmp_path / "till-async") for name in loaded(folder)
    }
    assert files - {"buy"} <= ran, "a file was written and never run"
    assert reader.commands.count(".venv/bin/python buy.py") == 3
    record_property("tell", f"tutorial: {len(reader.commands)} commands, {len(files)} files")


def copy_and_repeat(reader: Reader, blocks: list[Block]) -> None:
    """Do what the last step says in words."""
    before = reader.folder.parent / "till" / "app"
    for name in ("orders.py", "receipts.py"):
        (reader.folder / "app" / name).write_text((before / name).read_text("utf-8"), "utf-8")
    for block in blocks:
        if block.language == "diff" or "app/main.py" not in block.text:
            reader.follow(block)
