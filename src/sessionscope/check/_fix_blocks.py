"""The fixes that move statements: into a ``with`` block, or to the top of the module."""

from collections.abc import Sequence

import libcst as cst
from libcst import matchers

from sessionscope.check._fix_places import Fix, assigned, is_call_of


class WrapInWith(Fix):
    """SES102 and SES105: the rest of the block moves into ``with ... as session:``."""

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        lines = [self.at(statement)[0] for statement in original_node.body]
        if self.place[0] not in lines:
            return updated_node
        made = lines.index(self.place[0])
        statement = updated_node.body[made]
        name = assigned(statement)
        rest = updated_node.body[made + 1 :]
        if name is None or not isinstance(statement, cst.SimpleStatementLine) or not rest:
            return updated_node
        manager = self.manager(statement)
        if manager is None:
            return updated_node
        inside, after = _to_its_close(rest, name)
        kept = [line for line in inside if not is_call_of(line, f"{name}.close")] or rest[:1]
        awaits = cst.Asynchronous() if self.finding.message.count("async with") else None
        block = cst.With(
            items=[cst.WithItem(manager, cst.AsName(cst.Name(name)))],
            body=cst.IndentedBlock(kept, header=statement.trailing_whitespace),
            asynchronous=awaits,
            leading_lines=statement.leading_lines,
        )
        return updated_node.with_changes(body=[*updated_node.body[:made], block, *after])

    def manager(self, statement: cst.SimpleStatementLine) -> cst.BaseExpression | None:
        """Return what the block is over, in place of what *statement* assigned."""
        value = _value(statement)
        if self.finding.code == "SES102":
            return value
        wrapper = "asynccontextmanager" if isinstance(value, cst.Await) else "contextmanager"
        step = value.expression if isinstance(value, cst.Await) else value
        if not isinstance(step, cst.Call) or len(step.args) != 1:
            return None
        provider = step.args[0].value
        if not isinstance(provider, cst.Call):
            return None
        managed = cst.Call(cst.Name(wrapper), [cst.Arg(provider.func)])
        return provider.with_changes(func=managed)


class Hoist(Fix):
    """SES101: the statement moves above the function that it stands in."""

    moved: cst.SimpleStatementLine | None = None

    def leave_SimpleStatementLine(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        if self.at(original_node)[0] != self.place[0] or assigned(original_node) is None:
            return updated_node
        self.moved = updated_node
        return cst.RemoveFromParent()

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if updated_node.body:
            return updated_node
        return updated_node.with_changes(body=[cst.SimpleStatementLine([cst.Pass()])])

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:  # noqa: N802 - LibCST calls it so
        if self.moved is None:
            return updated_node
        name = assigned(self.moved)
        if any(assigned(line) == name for line in original_node.body):
            return original_node  # another engine of this name was moved up before
        before = [n for n, line in enumerate(original_node.body) if self.at(line) < self.place]
        place = before[-1]
        blank = _blank_lines(updated_node.body[place])
        comments = [line for line in self.moved.leading_lines if line.comment is not None]
        line = self.moved.with_changes(leading_lines=[*blank, *comments])
        body = [*updated_node.body[:place], line, *updated_node.body[place:]]
        return updated_node.with_changes(body=body)


def _to_its_close(
    lines: Sequence[cst.BaseStatement], name: str
) -> tuple[Sequence[cst.BaseStatement], Sequence[cst.BaseStatement]]:
    """Divide *lines* where the session was closed, so that the block holds it no longer."""
    closed = [n for n, line in enumerate(lines) if is_call_of(line, f"{name}.close")]
    after = lines[closed[-1] + 1 :] if closed else ()
    if not closed or any(matchers.findall(line, matchers.Name(name)) for line in after):
        return lines, ()
    return lines[: closed[-1] + 1], after


def _value(statement: cst.SimpleStatementLine) -> cst.BaseExpression | None:
    line = statement.body[0]
    return line.value if isinstance(line, cst.Assign | cst.AnnAssign) else None


def _blank_lines(statement: cst.CSTNode) -> Sequence[cst.EmptyLine]:
    lines = getattr(statement, "leading_lines", ())
    return [line for line in lines if line.comment is None]
