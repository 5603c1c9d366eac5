"""Where a fix takes place, and what stands there."""

import libcst as cst
from libcst.metadata import CodeRange, PositionProvider

from sessionscope.check._finding import Finding


class Fix(cst.CSTTransformer):
    """One change at the place of one finding."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: str, finding: Finding) -> None:
        super().__init__()
        self.finding = finding
        self.place = finding.line, finding.column - 1
        self.steps = [step.line for step in finding.evidence if step.path == path]

    def at(self, node: cst.CSTNode) -> tuple[int, int]:
        """Return where *node* begins."""
        place = self.get_metadata(PositionProvider, node)
        assert isinstance(place, CodeRange)
        return place.start.line, place.start.column


def assigned(statement: cst.BaseStatement) -> str | None:
    """Return the one name that *statement* assigns to."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return None
    match statement.body[0]:
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
            return str(name)
        case cst.AnnAssign(target=cst.Name(value=name)):
            return str(name)
        case _:
            return None


def is_call_of(statement: cst.BaseStatement, function: str) -> bool:
    """Return whether *statement* is ``function()``, awaited or not."""
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return False
    line = statement.body[0]
    value = line.value if isinstance(line, cst.Expr) else None
    call = value.expression if isinstance(value, cst.Await) else value
    return isinstance(call, cst.Call) and cst.Module([]).code_for_node(call) == f"{function}()"
