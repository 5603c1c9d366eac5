"""The commands ``check``, ``rules`` and ``explain``."""

import argparse
import gc
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from sessionscope.check import _registry
from sessionscope.check._cache import Cache
from sessionscope.check._config import (
    UNUSED_NOQA,
    UNUSED_NOQA_PAGE,
    Config,
    UsageError,
    checked,
    load,
)
from sessionscope.check._files import Problem, SourceFile, discover
from sessionscope.check._finding import CONFIDENCES, Report
from sessionscope.check._report import as_json, github, statistics, text
from sessionscope.check._versions import Version, fastapi_version

CLEAN, FOUND, UNUSABLE = 0, 1, 2


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sessionscope check``."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and folders")
    parser.add_argument("--format", choices=("text", "json", "sarif", "github"), default="text")
    parser.add_argument("--select", metavar="CODE,…", help="these rules alone")
    parser.add_argument("--ignore", metavar="CODE,…", help="not these rules")
    parser.add_argument(
        "--confidence", choices=CONFIDENCES[::-1], help="how sure a finding must be"
    )
    parser.add_argument("--statistics", action="store_true", help="count the findings per rule")
    parser.add_argument(
        "--providers",
        action="store_true",
        help="print what is believed to create, provide, own and receive sessions",
    )
    parser.add_argument("--fix", action="store_true", help="mend what can be mended safely")
    parser.add_argument(
        "--unsafe-fixes", action="store_true", help="with --fix: also what may change behaviour"
    )
    parser.add_argument("--no-cache", action="store_true", help="do not use the cache")
    parser.set_defaults(run=check)


def add_explain(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sessionscope explain``."""
    parser.add_argument("code", metavar="CODE", help="for instance SES105")
    parser.set_defaults(run=explain)


def explain(arguments: argparse.Namespace) -> int:
    """Print the page of a rule."""
    if arguments.code.upper() == UNUSED_NOQA:
        print(UNUSED_NOQA_PAGE)
        return CLEAN
    rule = _registry.RULES.get(arguments.code.upper())
    if rule is None:
        return _unusable(f"no rule is called {arguments.code!r}: `sessionscope rules` lists them")
    print(f"# {rule.code} {rule.name}\n\n{rule.page}")
    return CLEAN


def rules(_: argparse.Namespace) -> int:
    """Print the list of rules."""
    for rule in _registry.RULES.values():
        print(f"{rule.code}  {rule.name:<32}{rule.default:<8}{rule.summary}")
    return CLEAN


def check(arguments: argparse.Namespace) -> int:
    """Check files and print what was found."""
    # The process ends soon: collecting garbage would only cost time.
    gc.disable()
    try:
        config = _configured(arguments)
    except UsageError as error:
        return _unusable(str(error))
    problems: list[Problem] = []
    files = discover(arguments.paths, config.exclude, problems)
    framework = fastapi_version(_folder(arguments.paths))
    if arguments.providers:
        return _print_providers(files, config, framework, problems)
    report = _report(files, config, framework, cached=not arguments.no_cache)
    if arguments.fix:
        report = _fixed(report, files, config, framework, unsafe=arguments.unsafe_fixes)
    report.problems[:0] = problems
    _print(report, arguments)
    gc.freeze()
    if report.problems:
        return UNUSABLE
    return FOUND if any(config.fails(finding) for finding in report.findings) else CLEAN


def _unusable(message: str) -> int:
    print(f"sessionscope: {message}", file=sys.stderr)
    return UNUSABLE


def _configured(arguments: argparse.Namespace) -> Config:
    if arguments.unsafe_fixes and not arguments.fix:
        raise UsageError("--unsafe-fixes changes nothing by itself: write --fix --unsafe-fixes")
    config = load(Path.cwd())
    if arguments.select is not None:
        config = replace(config, select=checked(arguments.select.split(",")))
    if arguments.ignore is not None:
        config = replace(config, ignore=checked(arguments.ignore.split(",")))
    if arguments.confidence is not None:
        config = replace(config, confidence=arguments.confidence)
    return config


def _folder(paths: Iterable[str]) -> Path:
    first = Path(os.path.realpath(next(iter(paths))))  # resolve() raises on a circle of links
    return first if first.is_dir() else first.parent


def _report(
    files: list[SourceFile], config: Config, framework: Version | None, *, cached: bool
) -> Report:
    if not cached:
        return _run(files, config, framework)
    cache = Cache(files, config, framework)
    report = cache.load()
    if report is None:
        report = _run(files, config, framework)
        cache.store(report)
    return report


def _run(files: list[SourceFile], config: Config, framework: Version | None) -> Report:
    report: Report = _loaded("_run").run(files, config, framework)
    return report


def _loaded(name: str) -> Any:
    """Return a module of the checker that a run from the cache does without."""
    return import_module(f"sessionscope.check.{name}")


def _print_providers(
    files: list[SourceFile], config: Config, framework: Version | None, problems: list[Problem]
) -> int:
    running = _loaded("_run")
    with running.quietly():
        project = running.Project(config, framework)
        project.read(files)
        for line in _loaded("_providers").describe(project.model()):
            print(line)
    problems += project.report.problems
    _warn(problems)
    return UNUSABLE if problems else CLEAN


def _fixed(
    report: Report,
    files: list[SourceFile],
    config: Config,
    framework: Version | None,
    *,
    unsafe: bool,
) -> Report:
    try:
        fix = _loaded("_fix")
    except ModuleNotFoundError as error:
        if error.name != "libcst":
            raise
        print('Fixes need LibCST: pip install "sessionscope[codemod]"', file=sys.stderr)
        return report
    try:
        number = fix.apply(
            report.findings, {file.path: Path(file.full) for file in files}, unsafe=unsafe
        )
    except OSError as error:
        report = _run(files, config, framework)  # others may be mended already
        report.problems.append(
            Problem(str(error.filename), 1, f"cannot be mended: {error.strerror}")
        )
        return report
    print(f"Fixed {number} finding{'' if number == 1 else 's'}.", file=sys.stderr)
    return _run(files, config, framework) if number else report


def _print(report: Report, arguments: argparse.Namespace) -> None:
    match arguments.format:
        case "json":
            print(as_json(report))
        case "sarif":
            print(_loaded("_sarif").sarif(report, _version()))
        case "github":
            print(*github(report), sep="\n")
        case _:
            lines = statistics(report) if arguments.statistics else text(report)
            print(*lines, sep="\n")
            return
    _warn(report.problems)
    if not report.files:
        print("Nothing was checked: no Python file was found.", file=sys.stderr)


def _warn(problems: Iterable[Problem]) -> None:
    for problem in problems:
        print(f"{problem.path}:{problem.line}: {problem.text}", file=sys.stderr)


def _version() -> str:
    metadata = import_module("importlib.metadata")
    try:
        return str(metadata.version("sessionscope"))
    except metadata.PackageNotFoundError:
        return "0"
