"""The command ``sessionscope``: each subcommand is loaded when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 clean, 1 findings, 2 unusable."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        # The name of a file may hold what the terminal cannot show.
        reconfigure(errors="backslashreplace")
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    command = import_module("sessionscope.check._command")
    parser = argparse.ArgumentParser(
        prog="sessionscope", description="One engine, one factory, one session per unit of work."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands.add_parser("init", help="write a new project"))
    command.add_check(commands.add_parser("check", help="find misuse of sessions in source code"))
    commands.add_parser("rules", help="list the rules of the checker").set_defaults(
        run=command.rules
    )
    command.add_explain(commands.add_parser("explain", help="print the page of a rule"))
    _add_doctor(commands.add_parser("doctor", help="examine a Database where it runs"))
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sessionscope doctor``, which loads SQLAlchemy when it runs."""
    parser.add_argument(
        "target",
        metavar="MODULE:ATTRIBUTE",
        nargs="?",
        default="database:database",
        help="your Database (default: database:database)",
    )
    parser.add_argument(
        "--processes",
        type=_at_least_one,
        default=1,
        metavar="N",
        help="how many processes run it, on all machines (default: 1)",
    )
    parser.add_argument(
        "--rate",
        type=_positive,
        metavar="N",
        help="units of work per second over all processes: estimate their waiting",
    )
    parser.add_argument(
        "--hold",
        type=_positive,
        nargs="+",
        default=[0.02],
        metavar="SECONDS",
        help="how long a unit holds its connection; several are drawn from (0.02)",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    return int(import_module("sessionscope.doctor").doctor(arguments))


def _at_least_one(told: str) -> int:
    number = int(told)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{told} is less than 1")
    return number


def _positive(told: str) -> float:
    number = float(told)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{told} is no number above 0")
    return number


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="here, if left out")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--sync", dest="is_async", action="store_false", help="endpoints in `def` (the default)"
    )
    kind.add_argument(
        "--async", dest="is_async", action="store_true", help="endpoints in `async def`"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="the wheel, sdist or checkout to install sessionscope from",
    )
    parser.set_defaults(is_async=False, run=_init)


def _init(arguments: argparse.Namespace) -> int:
    # What it needs to read archives and metadata would slow the checker down.
    return int(import_module("sessionscope._project").init(arguments))
