"""The facts that the walk collects: scopes, and what happens to each name in them."""

import ast
import posixpath
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
BlockKind = Literal[
    "body", "if", "orelse", "loop", "with", "try", "except", "else", "finally", "case"
]
# How the value of an expression is used by what surrounds it.
Role = Literal[
    "method",  # receiver of a method call
    "call",  # is itself called
    "attribute",  # an attribute of it is read
    "argument",
    "element",  # inside a tuple, list, dict or comprehension
    "return",
    "yield",
    "assign",
    "with",
    "loop",  # iterated over
    "await",
    "statement",  # its value is dropped
    "test",
    "other",
]


class Block:
    """A run of statements: a body, a branch, a handler."""

    __slots__ = ("kind", "node", "parent")

    def __init__(self, kind: BlockKind, node: ast.AST, parent: "Block | None") -> None:
        self.kind = kind
        self.node = node
        self.parent = parent

    def chain(self) -> "Iterator[Block]":
        """Yield this block and those around it, the innermost first."""
        block: Block | None = self
        while block is not None:
            yield block
            block = block.parent


class Use(NamedTuple):
    """One use of a name or of a dotted path such as ``self.session``."""

    role: Role
    name: str  # the method or attribute, if any
    node: ast.expr  # the call for "method", else the expression itself
    owner: ast.AST  # what uses it: the call, the statement
    block: Block


class CallFact(NamedTuple):
    """One call and what is done with its result."""

    node: ast.Call
    role: Role
    owner: ast.AST
    block: Block
    name: str  # the last name of what is called


class Binding(NamedTuple):
    """One thing that a name is bound to."""

    kind: Literal["value", "with", "loop", "import", "scope", "parameter", "unknown", "annotation"]
    line: int
    column: int
    value: "ast.expr | Scope | ast.arg | str | None"
    block: Block
    annotation: ast.expr | None = None
    place: int | None = None  # which one, where a tuple is unpacked


class Outcome(NamedTuple):
    """A ``return`` or ``yield``."""

    node: ast.expr | ast.Return
    value: ast.expr | None
    block: Block


class Scope:
    """A module, class or function and everything that was seen directly in it."""

    __slots__ = (
        "asked",
        "bindings",
        "block",
        "calls",
        "children",
        "globals",
        "is_async",
        "is_generator",
        "kind",
        "memo",
        "module",
        "name",
        "node",
        "parent",
        "raises",
        "returns",
        "tries",
        "uses",
        "withs",
        "yields",
    )

    def __init__(
        self,
        kind: Literal["module", "class", "function"],
        name: str,
        node: ast.Module | ast.ClassDef | Function,
        parent: "Scope | None",
        module: "Module",
        block: Block | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.node = node
        self.parent = parent
        self.module = module
        self.block = block
        self.is_async = isinstance(node, ast.AsyncFunctionDef)
        self.is_generator = False
        self.raises = False  # ends with a ``raise``
        self.asked = False  # calls a method that a session has, on whatever it may be
        self.bindings: dict[str, list[Binding]] = {}
        self.uses: dict[str, list[Use]] = {}
        self.calls: list[CallFact] = []
        # Tuples, because most stay empty, and a project has a hundred thousand scopes.
        self.children: tuple[Scope, ...] = ()
        self.returns: tuple[Outcome, ...] = ()
        self.yields: tuple[Outcome, ...] = ()
        self.tries: tuple[tuple[ast.Try, Block], ...] = ()
        self.withs: tuple[tuple[ast.With | ast.AsyncWith, Block], ...] = ()
        self.globals: frozenset[str] = frozenset()
        self.memo: dict[object, object] = {}

    def __repr__(self) -> str:
        return f"<{self.kind} {self.qualname} of {self.module.path}>"

    @property
    def qualname(self) -> str:
        """The dotted name inside the module."""
        if self.parent is None or self.parent.kind == "module":
            return self.name
        return f"{self.parent.qualname}.{self.name}"

    @property
    def function(self) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The ``def`` of this scope, if it is one."""
        node = self.node
        return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None

    @property
    def decorators(self) -> list[ast.expr]:
        """The decorators of a function or class."""
        node = self.node
        return [] if isinstance(node, ast.Module | ast.Lambda) else node.decorator_list

    @property
    def owner_class(self) -> "Scope | None":
        """The class whose method this is."""
        parent = self.parent
        return parent if self.kind == "function" and parent and parent.kind == "class" else None

    def around(self) -> "Iterator[Scope]":
        """Yield this scope and those around it that its names are looked up in."""
        yield self
        scope = self.parent
        while scope is not None:
            if scope.kind != "class":
                yield scope
            scope = scope.parent

    def method(self) -> "Scope | None":
        """Return the method that this scope is, or is nested in."""
        scope: Scope | None = self
        while scope is not None and scope.owner_class is None:
            scope = scope.parent
        return scope

    def within(self) -> "Iterator[Scope]":
        """Yield this scope and all functions and classes in it."""
        yield self
        for child in self.children:
            yield from child.within()


class Module:
    """One source file."""

    __slots__ = (
        "folder",
        "forever",
        "imports",
        "local",
        "main",
        "name",
        "path",
        "relevant",
        "scope",
        "scopes",
        "stars",
    )

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.folder = posixpath.dirname(path)
        self.local = path  # below the folder that was named
        self.name = name
        self.relevant = True
        self.forever = False  # has a ``while True``: a process that does not end
        self.main: Block | None = None  # the block of ``if __name__ == "__main__"``
        self.imports: list[str] = []  # what its import statements name, but for stars
        self.stars: list[str] = []
        self.scopes: list[Scope] = []
        self.scope = Scope("module", "", ast.Module([], []), None, self)


def words(text: str) -> frozenset[str]:
    """Return the words of *text*, for long lists of names."""
    return frozenset(text.split())


def position(node: ast.expr | ast.stmt | ast.excepthandler) -> tuple[int, int]:
    """Return where *node* begins, to compare with others of the same file."""
    return node.lineno, node.col_offset


def parameters(node: Function) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    """Yield each parameter of *node* with its default."""
    arguments = node.args
    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    yield from zip(plain, defaults, strict=True)
    if arguments.vararg:
        yield arguments.vararg, None
    yield from zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    if arguments.kwarg:
        yield arguments.kwarg, None


def last_name(call: ast.Call) -> str:
    """Return the last name of what *call* calls, or ""."""
    function = call.func
    if type(function) is ast.Attribute:
        return function.attr
    return function.id if type(function) is ast.Name else ""


def dotted(node: ast.AST) -> str | None:
    """Return ``a.b.c`` for such an expression, None for any other."""
    if type(node) is ast.Name:
        return node.id
    parts: list[str] = []
    while type(node) is ast.Attribute:
        parts.append(node.attr)
        node = node.value
    if type(node) is not ast.Name:
        return None
    parts.append(node.id)
    return ".".join(reversed(parts))


def decorator_names(scope: Scope) -> set[str]:
    """Return the last names of the decorators of *scope*."""
    return set(_last_names(scope.decorators))


def _last_names(decorators: Iterable[ast.expr]) -> Iterator[str]:
    for decorator in decorators:
        node = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = dotted(node)
        if name is not None:
            yield name.rpartition(".")[2]


def receiver(method: Scope) -> str | None:
    """Return what the method *method* calls its object."""
    if method.kind != "function" or isinstance(method.node, ast.Module | ast.ClassDef):
        return None
    first = (method.node.args.posonlyargs + method.node.args.args)[:1]
    return first[0].arg if first else None


# Methods that only sessions are expected to have beside a few others; each is verified.
STATEMENTS = words(
    "execute scalar scalars query get get_one merge refresh flush commit exec stream "
    "stream_scalars bulk_save_objects bulk_insert_mappings bulk_update_mappings"
)
SESSION_METHODS = STATEMENTS | words(
    "add add_all delete rollback close expunge expunge_all expire expire_all begin begin_nested "
    "remove connection aclose invalidate"
)
