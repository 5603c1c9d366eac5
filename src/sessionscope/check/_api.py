"""The checker as functions: what a program calls where a person types the command."""

import os
from collections.abc import Iterable

from sessionscope.check._config import Config
from sessionscope.check._files import Problem, discover, folder_of
from sessionscope.check._finding import Finding
from sessionscope.check._run import run, run_source
from sessionscope.check._versions import fastapi_version


def check_paths(
    paths: Iterable[str | os.PathLike[str]], config: Config | None = None
) -> list[Finding]:
    """Check the files at and below *paths* as one project and return the findings.

    What cannot be read or parsed is left out. Without *config* the defaults apply,
    not those of a pyproject.toml.
    """
    config = config or Config()
    problems: list[Problem] = []
    given = list(paths)
    files = discover(given, config.exclude, problems, config.folder)
    folder = folder_of(given[0] if given else ".")
    return run(files, config, fastapi_version(folder)).findings


def check_source(
    source: str | bytes, path: str = "source.py", config: Config | None = None
) -> list[Finding]:
    """Check one piece of source code and return the findings.

    FastAPI is taken to be the newest. Raises SyntaxError if *source* cannot be parsed.
    """
    report = run_source(source, path, config or Config(), None)
    for problem in report.problems:
        raise SyntaxError(problem.text, (problem.path, problem.line, None, None))
    return report.findings
