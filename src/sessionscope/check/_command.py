"""The commands ``check``, ``rules`` and ``explain``."""

import argparse
import gc
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from sessionscope.check import _registry
from sessionscope.check._cache import Cache
from sessionscope.check._config import (
    UNUSED_NOQA,
    UNUSED_NOQA_PAGE,
    Config,
    UsageError,
    by_project,
    checked,
)
from sessionscope.check._files import (
    Problem,
    SourceFile,
    absolute,
    discover,
    folder_of,
    shown_from,
    stamp,
)
from sessionscope.check._finding import CONFIDENCES, Report
from sessionscope.check._report import as_json, github, nothing, statistics, text
from sessionscope.check._versions import Version, fastapi_version

CLEAN, FOUND, UNUSABLE = 0, 1, 2


class Batch(NamedTuple):
    """What is checked together: the files of one project, its settings, its FastAPI."""

    files: list[SourceFile]
    config: Config
    framework: Version | None


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
    problems: list[Problem] = []
    try:
        batches = _batches(arguments, problems)
    except UsageError as error:
        return _unusable(str(error))
    lacks_libcst = arguments.fix and not _can_fix()
    if lacks_libcst:
        _unusable("--fix needs LibCST: pip install 'sessionscope[codemod]'")
        arguments.fix = False  # what is found is told all the same
    if arguments.providers:
        return _print_providers(batches, problems)
    reports = [_checked(batch, arguments) for batch in batches]
    report = _joined(problems, reports)
    _print(report, arguments)
    gc.freeze()
    if report.problems or lacks_libcst:
        return UNUSABLE
    failed = any(
        batch.config.fails(finding)
        for batch, found in zip(batches, reports, strict=True)
        for finding in found.findings
    )
    return FOUND if failed else CLEAN


def _unusable(message: str) -> int:
    print(f"sessionscope: {message}", file=sys.stderr)
    return UNUSABLE


def _batches(arguments: argparse.Namespace, problems: list[Problem]) -> list[Batch]:
    if arguments.unsafe_fixes and not arguments.fix:
        raise UsageError("--unsafe-fixes changes nothing by itself: write --fix --unsafe-fixes")
    batches: list[Batch] = []
    inner: list[Path] = []
    for settings, paths in by_project(arguments.paths):
        config = _overridden(settings, arguments)
        files = discover(paths, config.exclude, problems, config.folder)
        # `check . plugin`: what lies in a project of its own is not checked twice.
        files = [file for file in files if not _is_in(file, inner)]
        inner += [absolute(path) for path in paths]
        batches.append(Batch(files, config, fastapi_version(folder_of(paths[0]))))
    if len(batches) > 1:
        _tell_apart(batches)
    return batches


def _is_in(file: SourceFile, folders: list[Path]) -> bool:
    return any(absolute(file.path).is_relative_to(folder) for folder in folders)


def _overridden(config: Config, arguments: argparse.Namespace) -> Config:
    if arguments.select is not None:
        config = replace(config, select=checked(arguments.select.split(",")))
    if arguments.ignore is not None:
        config = replace(config, ignore=checked(arguments.ignore.split(",")))
    if arguments.confidence is not None:
        config = replace(config, confidence=arguments.confidence)
    return config


def _tell_apart(batches: list[Batch]) -> None:
    folders = [batch.config.folder for batch in batches]
    names = [shown_from(f / "pyproject.toml") if f else "the defaults" for f in folders]
    print(
        f"sessionscope: {len(batches)} projects, each checked by itself, with the settings of "
        + ", ".join(names),
        file=sys.stderr,
    )


def _checked(batch: Batch, arguments: argparse.Namespace) -> Report:
    # Before they are read: whatever changes later is not overwritten.
    stamps = {file.path: stamp(file.full) for file in batch.files} if arguments.fix else {}
    report = _report(batch, cached=not arguments.no_cache)
    if arguments.fix:
        report = _fixed(report, batch, stamps, unsafe=arguments.unsafe_fixes)
    return report


def _joined(problems: list[Problem], reports: list[Report]) -> Report:
    joined = Report(problems=list(problems))
    for report in reports:
        joined.findings += report.findings
        joined.problems += report.problems
        joined.files += report.files
        joined.lines += report.lines
    joined.findings.sort(key=lambda f: (f.path, f.line, f.column, f.code))
    return joined


def _report(batch: Batch, *, cached: bool) -> Report:
    if not cached:
        return _run(batch)
    cache = Cache(batch.files, batch.config, batch.framework)
    report = cache.load()
    if report is None:
        report = _run(batch)
        cache.store(report)
    return report


def _run(batch: Batch) -> Report:
    report: Report = _loaded("_run").run(batch.files, batch.config, batch.framework)
    return report


def _loaded(name: str) -> Any:
    """Return a module of the checker that a run from the cache does without."""
    return import_module(f"sessionscope.check.{name}")


def _print_providers(batches: list[Batch], problems: list[Problem]) -> int:
    running = _loaded("_run")
    reports: list[Report] = []
    with running.quietly():
        for batch in batches:
            project = running.Project(batch.config, batch.framework)
            project.read(batch.files)
            for line in _loaded("_providers").describe(project.model()):
                print(line)
            reports.append(project.report)
    report = _joined(problems, reports)
    _warn(report.problems)
    if not report.files:
        print(nothing(report), file=sys.stderr)
    return UNUSABLE if report.problems else CLEAN


def _can_fix() -> bool:
    """Return whether LibCST, which makes the fixes, is installed."""
    try:
        import_module("libcst")
    except ModuleNotFoundError as error:
        if error.name != "libcst":
            raise
        return False
    return True


def _fixed(report: Report, batch: Batch, stamps: dict[str, bytes], *, unsafe: bool) -> Report:
    fix = _loaded("_fix")
    files = {f.path: fix.Checked(Path(f.full), stamps[f.path]) for f in batch.files}
    number, problems = fix.apply(report.findings, files, unsafe=unsafe)
    print(f"Fixed {number} finding{'' if number == 1 else 's'}.", file=sys.stderr)
    if number:
        report = _run(batch)
    report.problems += problems
    return report


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
        print(nothing(report), file=sys.stderr)


def _warn(problems: Iterable[Problem]) -> None:
    for problem in problems:
        print(f"{problem.path}:{problem.line}: {problem.text}", file=sys.stderr)


def _version() -> str:
    metadata = import_module("importlib.metadata")
    try:
        return str(metadata.version("sessionscope"))
    except metadata.PackageNotFoundError:
        return "0"
