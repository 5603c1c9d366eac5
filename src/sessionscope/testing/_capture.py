"""Capturing hooks: a test looks at what would have been called after a commit."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from sessionscope import Unit


@contextmanager
def capture_hooks() -> Generator[list[partial[object]]]:
    """Collect the hooks that are due meanwhile, instead of calling them.

    Those of every Database, in any thread or task, in the order in which they would be called; one
    whose transaction is rolled back is not among them. Each is the ``functools.partial`` of what
    ``after_commit()`` or ``after_rollback()`` was given: look at its ``func``, ``args`` and
    ``keywords``, or call it.
    """
    hooks: list[partial[object]] = []
    with Unit.hand_hooks_to(hooks.append):
        yield hooks
