"""The command ``sessionscope``: each subcommand is loaded when it is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 clean, 1 findings, 2 unusable."""
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
    command.add_check(commands.add_parser("check", help="find misuse of sessions in source code"))
    commands.add_parser("rules", help="list the rules of the checker").set_defaults(
        run=command.rules
    )
    command.add_explain(commands.add_parser("explain", help="print the page of a rule"))
    return parser
