"""A transaction of the sandbox, and whose it is: one user's work between its ends."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from sessionscope import Unit


class Transaction:
    """What one user of the connection has done since its last commit or rollback."""

    __slots__ = (
        "abandoned",
        "at_home",
        "autocommit",
        "begun_at",
        "ended",
        "failed",
        "info",
        "number",
        "read_only",
        "savepoint",
        "savepoints",
        "undone_by",
        "unseen",
        "wrote",
    )

    def __init__(self, info: Mapping[Any, Any], *, read_only: bool, autocommit: bool) -> None:
        self.info = info
        self.read_only = read_only
        self.autocommit = autocommit
        self.undone_by: str | None = None  # what has rolled it back unasked
        self.savepoint: str | None = None  # as long as it is on the stack
        self.begin(0, "", at_home=False)

    def begin(self, number: int, begun_at: str, *, at_home: bool) -> None:
        """Begin with the savepoint of that number, for those in autocommit mode once more."""
        self.number = number  # what was begun later has a higher one
        self.begun_at = begun_at
        self.at_home = at_home  # by the thread that opened the sandbox
        self.savepoints: dict[str, int] = {}  # those of begin_nested(), with such numbers
        self.unseen: int | None = None  # a cursor may write, after that savepoint, what no one sees
        self.wrote = self.failed = self.ended = False
        self.abandoned = False  # to be ended at the next turn, whoever has it

    @property
    def has_committed(self) -> bool:
        """Whether what it has written is, to its user, stored."""
        return self.ended or self.autocommit

    @property
    def keeps_its_place(self) -> bool:
        """Whether it has written, or may have, and has not ended."""
        may_have_written = self.wrote or self.unseen is not None
        return may_have_written and not (self.ended or self.abandoned)

    @property
    def is_of_this_flow(self) -> bool:
        """Whether the current flow of control, or one that started it, has begun it."""
        return self in _begun.get() or Unit.encloses(self.info)

    def belong_to_this_flow(self) -> None:
        """Be one that the current flow of control has begun."""
        _begun.set((*(other for other in _begun.get() if not other.ended), self))


_begun: ContextVar[tuple[Transaction, ...]] = ContextVar("sessionscope_begun", default=())
