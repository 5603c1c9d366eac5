"""The paths through a function: in what state does each leave a session behind?"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

# States of the session, as bits: a place can be reached in several.
ABSENT, OPEN, IDLE, DONE = 1, 2, 4, 8
_ALL_ERRORS = frozenset({"Exception", "BaseException"})
_EXITS = frozenset({"exit", "_exit", "quit", "abort", "execv", "execvp"})
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_TRIES = (ast.Try, ast.TryStar)


@dataclass(slots=True)
class Marks:
    """The nodes (by identity) that change the state of one session."""

    name: str
    opened: set[int] = field(default_factory=set[int])
    closed: set[int] = field(default_factory=set[int])
    idle: set[int] = field(default_factory=set[int])
    used: set[int] = field(default_factory=set[int])
    given: set[int] = field(default_factory=set[int])  # handed to someone who owns it now
    flags: set[str] = field(default_factory=set[str])  # names that are true where it was made


@dataclass(slots=True)
class Exits:
    """The states in which a run of statements is left, by way of leaving it."""

    falls: int = 0
    returned: int = 0
    raised: int = 0
    broken: int = 0
    continued: int = 0

    def take(self, other: "Exits") -> None:
        """Add the ways out of *other*, but for the one at its end."""
        self.returned |= other.returned
        self.raised |= other.raised
        self.broken |= other.broken
        self.continued |= other.continued


def leave(body: Iterable[ast.stmt], marks: Marks) -> tuple[Exits, dict[str, ast.stmt]]:
    """Return the states at the ends of *body*, and where it is first left open."""
    paths = _Paths(marks)
    exits = paths.run(body, ABSENT)
    return exits, paths.left_open


class _Paths:
    def __init__(self, marks: Marks) -> None:
        self.marks = marks
        self.left_open: dict[str, ast.stmt] = {}

    def run(self, body: Iterable[ast.stmt], state: int) -> Exits:
        exits = Exits()
        for node in body:
            if not state:
                break
            found = self.step(node, state)
            exits.take(found)
            state = found.falls
        exits.falls = state
        return exits

    def step(self, node: ast.stmt, state: int) -> Exits:
        match node:
            case ast.If():
                return self.branch(node, state)
            case ast.For() | ast.AsyncFor() | ast.While():
                return self.loop(node, state)
            case ast.With() | ast.AsyncWith():
                return self.managed(node, state)
            case ast.Try() | ast.TryStar():
                return self.attempt(node, state)
            case ast.Match():
                return self.cases(node, state)
            case _:
                return self.simple(node, state)

    def simple(self, node: ast.stmt, state: int) -> Exits:
        if isinstance(node, _FUNCTIONS):
            return Exits(falls=state)
        after, raised = self.effect(node, state)
        if isinstance(node, ast.Return):
            self.note("return", node, after)
            return Exits(returned=after, raised=raised)
        if isinstance(node, ast.Raise):
            self.note("raise", node, after)
            return Exits(raised=raised | after)
        if isinstance(node, ast.Break):
            return Exits(broken=after)
        if isinstance(node, ast.Continue):
            return Exits(continued=after)
        if raised & OPEN:
            self.note("error", node, raised)
        if _exits(node):
            return Exits(raised=raised & ~OPEN)
        return Exits(falls=after, raised=raised)

    def note(self, kind: str, node: ast.stmt, state: int) -> None:
        if state & OPEN:
            self.left_open.setdefault(kind, node)

    def effect(self, node: ast.AST, state: int) -> tuple[int, int]:
        """Return the state after *node*, and that in which it may raise."""
        marks, raised = self.marks, 0
        seen = {id(inner) for inner in _nodes(node)}
        if seen & marks.opened:
            return OPEN, 0
        if seen & marks.closed:
            return _change(state, DONE), 0
        if seen & marks.given:
            return _change(state, DONE), 0
        if seen & marks.idle:
            # A rollback does not fail in practice; a commit may, while the session is open.
            return _change(state, IDLE), state & OPEN
        if seen & marks.used:
            state = _change(state, OPEN)
            raised = state
        return state, raised

    def branch(self, node: ast.If, state: int) -> Exits:
        state, raised = self.effect(node.test, state)
        yes, no = self.narrowed(node.test, state)
        exits = self.run(node.body, yes)
        other = self.run(node.orelse, no)
        exits.take(other)
        exits.falls |= other.falls
        exits.raised |= raised
        return exits

    def narrowed(self, test: ast.expr, state: int) -> tuple[int, int]:
        """``if session:`` tells whether there is one."""
        present = state & ~ABSENT
        match test:
            case ast.Name(id=name) if name == self.marks.name or name in self.marks.flags:
                return present, state & (ABSENT | DONE)
            case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()]) if name == self.marks.name:
                return present, state & (ABSENT | DONE)
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()]) if name == self.marks.name:
                return state & (ABSENT | DONE), present
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yes, no = self.narrowed(operand, state)
                return no, yes
            case ast.BoolOp(op=ast.And(), values=[first, *_]):
                yes, _ = self.narrowed(first, state)
                return yes, state if yes == state else state & (ABSENT | DONE)
            case ast.Constant(value=True):
                return state, 0
            case _:
                return state, state

    def loop(self, node: ast.For | ast.AsyncFor | ast.While, state: int) -> Exits:
        test = node.test if isinstance(node, ast.While) else node.iter
        state, raised = self.effect(test, state)
        exits = Exits(raised=raised)
        endless = isinstance(test, ast.Constant) and bool(test.value)
        after = 0 if endless else state
        for _ in range(2):
            found = self.run(node.body, state)
            exits.returned |= found.returned
            exits.raised |= found.raised
            state |= found.falls | found.continued
            after |= found.broken | (0 if endless else found.falls | found.continued)
        rest = self.run(node.orelse, after)
        exits.take(rest)
        exits.falls = rest.falls
        return exits

    def managed(self, node: ast.With | ast.AsyncWith, state: int) -> Exits:
        raised = 0
        closes = suppresses = False
        for item in node.items:
            state, may = self.effect(item.context_expr, state)
            raised |= may
            names = {n.id for n in ast.walk(item.context_expr) if isinstance(n, ast.Name)}
            # ``with session:`` and ``with closing(session):`` end it; session.begin() does not.
            closes = closes or (self.marks.name in names and not _begins(item.context_expr))
            suppresses = suppresses or "suppress" in names
        exits = self.run(node.body, state)
        if closes:
            exits = Exits(*(_change(s, DONE) for s in _states(exits)))
        if suppresses:
            exits.falls |= exits.raised
        exits.raised |= raised
        return exits

    def attempt(self, node: ast.Try | ast.TryStar, state: int) -> Exits:
        tried = self.run(node.body, state)
        exits = Exits(returned=tried.returned, broken=tried.broken, continued=tried.continued)
        exits.falls = tried.falls
        if node.orelse:
            rest = self.run(node.orelse, tried.falls)
            exits.take(rest)
            exits.falls = rest.falls
        # What raises may have raised at once, before the session was opened.
        caught = tried.raised or (DONE if self.closes(node.body[0]) else state)
        for handler in node.handlers:
            found = self.run(handler.body, caught)
            exits.take(found)
            exits.falls |= found.falls
        if not any(_catches_all(handler) for handler in node.handlers):
            exits.raised |= tried.raised
        return self.finished(node.finalbody, exits) if node.finalbody else exits

    def closes(self, node: ast.stmt) -> bool:
        """A close() that fails has closed the session all the same."""
        return any(id(inner) in self.marks.closed for inner in _nodes(node))

    def finished(self, body: list[ast.stmt], exits: Exits) -> Exits:
        """Send each way out through the ``finally`` block."""
        result = Exits()
        for place, state in enumerate(_states(exits)):
            if not state:
                continue
            found = self.run(body, state)
            result.take(found)
            ways = _states(result)
            ways[place] |= found.falls
            result = Exits(*ways)
        return result

    def cases(self, node: ast.Match, state: int) -> Exits:
        exits = Exits(falls=state)
        for case in node.cases:
            found = self.run(case.body, state)
            exits.take(found)
            exits.falls |= found.falls
        return exits


def _states(exits: Exits) -> list[int]:
    return [exits.falls, exits.returned, exits.raised, exits.broken, exits.continued]


def _change(state: int, to: int) -> int:
    """Return *state* with whatever is there turned into *to*; what is absent stays so."""
    present = state & ~ABSENT
    if to == OPEN:
        present &= ~DONE
        return (state & (ABSENT | DONE)) | (OPEN if present else 0)
    return (state & ABSENT) | (to if present else 0)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield *node* and what is in it, but not what is inside of functions."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _FUNCTIONS):
            yield from _nodes(child)


def _begins(node: ast.expr) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr.startswith("begin") for n in ast.walk(node))


def _exits(node: ast.stmt) -> bool:
    """``sys.exit()`` and its like end the process."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in _EXITS


def _catches_all(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    return any(
        isinstance(name, ast.Name) and name.id in _ALL_ERRORS for name in ast.walk(handler.type)
    )
