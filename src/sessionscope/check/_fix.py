"""The fixes, made with LibCST: what they do not touch stays as it is, byte for byte."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper

from sessionscope.check._files import Problem
from sessionscope.check._finding import Finding
from sessionscope.check._fix_blocks import Hoist, WrapInWith
from sessionscope.check._fix_imports import is_taken, needed, with_import
from sessionscope.check._fix_places import Fix, assigned, is_call_of
from sessionscope.check._replace import Changed, replace


class Checked(NamedTuple):
    """A file as it was when it was checked."""

    path: Path
    stamp: bytes


def apply(
    findings: Iterable[Finding], files: Mapping[str, Checked], *, unsafe: bool
) -> tuple[int, list[Problem]]:
    """Mend what can be mended in *files*; return how many findings that were, and what failed.

    A file is written as a whole or not at all, and only if it still parses and nobody has
    changed it since it was checked.
    """
    wanted = [f for f in findings if f.fix == "safe" or (unsafe and f.fix == "unsafe")]
    by_file: dict[str, list[Finding]] = {}
    for finding in wanted:
        for path in _files_of(finding):
            by_file.setdefault(path, []).append(finding)
    mended = set[Finding]()
    problems: list[Problem] = []
    for path, found in by_file.items():
        if path in files:
            try:
                mended |= _mend_file(files[path], path, found)
            except Changed:
                text = "has changed since it was checked and is not mended: run the command again"
                problems.append(Problem(path, 1, text))
            except OSError as error:
                problems.append(Problem(path, 1, f"cannot be mended: {error.strerror}"))
    return len(mended), problems


def _files_of(finding: Finding) -> set[str]:
    if finding.code == "SES206":
        return {step.path for step in finding.evidence[1:]}
    return {finding.path}


def _mend_file(file: Checked, path: str, findings: Sequence[Finding]) -> set[Finding]:
    source = file.path.read_bytes()
    mended = set[Finding]()
    # Bottom up, so that the places of the others stay what they are.
    for finding in sorted(findings, key=lambda f: (-f.line, -f.column)):
        changed = mend(source, path, finding)
        if changed != source:
            source = changed
            mended.add(finding)
    for name in sorted({name for finding in mended if (name := needed(finding))}):
        source = with_import(source, name)  # last, because it moves all lines below
    if mended:
        replace(file.path, source, file.stamp)
    return mended


def mend(source: bytes, path: str, finding: Finding) -> bytes:
    """Return *source* without *finding*, or as it is where the fix does not fit."""
    name = needed(finding)
    try:
        wrapper = MetadataWrapper(cst.parse_module(source))
        if name and is_taken(source, name):
            return source
    except (cst.ParserSyntaxError, SyntaxError, ValueError, LookupError):
        return source
    result = wrapper.visit(_FIXES[finding.code](path, finding)).bytes
    try:
        compile(result, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return source
    return result


class _CloseInFinally(Fix):
    """SES103: from the line after the session is made, ``try: … finally: close``."""

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        lines = [self.at(statement)[0] for statement in original_node.body]
        if self.place[0] not in lines:
            return updated_node
        made = lines.index(self.place[0])
        name = assigned(original_node.body[made])
        *_, last = updated_node.body
        if name is None or made >= len(lines) - 2 or not is_call_of(last, f"{name}.close"):
            return updated_node
        inner = updated_node.body[made + 1 : -1]
        attempt = cst.Try(
            body=cst.IndentedBlock(inner),
            finalbody=cst.Finally(cst.IndentedBlock([last])),
        )
        return updated_node.with_changes(body=[*updated_node.body[: made + 1], attempt])


class _StaticPool(Fix):
    """SES304: ``poolclass=StaticPool``; the import comes later."""

    changed = False

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:  # noqa: N802 - LibCST calls it so
        if self.at(original_node) != self.place or self.changed:
            return updated_node
        self.changed = True
        return updated_node.with_changes(
            args=_with_argument(updated_node, "poolclass", cst.Name("StaticPool"))
        )


class _DeleteStatement(Fix):
    """SES107: the call that closes goes."""

    def leave_SimpleStatementLine(  # noqa: N802 - LibCST calls it so
        self,
        original_node: cst.SimpleStatementLine,
        updated_node: cst.SimpleStatementLine,
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        if self.at(original_node)[0] != self.place[0] or not _closes(original_node):
            return updated_node
        return cst.RemoveFromParent()

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if updated_node.body:
            return updated_node
        line = cst.SimpleStatementLine([cst.Pass()])
        return updated_node.with_changes(body=[line])

    def leave_Try(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.Try, updated_node: cst.Try
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        """A ``finally`` that has nothing else to do goes too, and a bare ``try`` with it."""
        finals = original_node.finalbody
        if finals is None or not self._is_all_of(finals.body):
            return updated_node
        if updated_node.handlers:
            return updated_node.with_changes(finalbody=None)
        body = updated_node.body
        if not isinstance(body, cst.IndentedBlock) or body.header.comment is not None:
            return updated_node
        first, *rest = body.body
        leading = [*updated_node.leading_lines, *getattr(first, "leading_lines", ())]
        return cst.FlattenSentinel([first.with_changes(leading_lines=leading), *rest])

    def _is_all_of(self, body: cst.BaseSuite) -> bool:
        """Return whether the call that closes is all that *body* does, and nobody comments it."""
        lines = body.body
        return (
            len(lines) == 1
            and isinstance(lines[0], cst.SimpleStatementLine)
            and self.at(lines[0])[0] == self.place[0]
            and _closes(lines[0])
            and "#" not in cst.Module([]).code_for_node(body)
        )


class _PlainDef(Fix):
    """SES205: ``def`` instead of ``async def``."""

    def leave_FunctionDef(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        if self.at(original_node)[0] not in self.steps[:1]:
            return updated_node
        return updated_node.with_changes(asynchronous=None)


class _FunctionScope(Fix):
    """SES206: ``scope="function"`` at each ``Depends``."""

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.Call:  # noqa: N802 - LibCST calls it so
        function = original_node.func
        name = function.attr if isinstance(function, cst.Attribute) else function
        if self.at(original_node)[0] not in self.steps or not isinstance(name, cst.Name):
            return updated_node
        if name.value not in {"Depends", "Security"} or not _names(
            original_node, self.finding.message
        ):
            return updated_node
        value = cst.SimpleString('"function"')
        return updated_node.with_changes(args=_with_argument(updated_node, "scope", value))


class _RollBack(Fix):
    """SES402: a rollback is the first thing that the handler does."""

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if not original_node.body or self.at(original_node.body[0])[0] != self.steps[1]:
            return updated_node
        call = self.finding.message.partition("`")[2].partition("`")[0]
        path = call.removesuffix("()").rpartition(".")[0]
        wait = "await " if "awaited" in self.finding.evidence[0].text else ""
        line = cst.parse_statement(f"{wait}{path}.rollback()\n")
        return updated_node.with_changes(body=[line, *updated_node.body])


_FIXES: dict[str, type[Fix]] = {
    "SES101": Hoist,
    "SES102": WrapInWith,
    "SES103": _CloseInFinally,
    "SES105": WrapInWith,
    "SES107": _DeleteStatement,
    "SES205": _PlainDef,
    "SES206": _FunctionScope,
    "SES304": _StaticPool,
    "SES402": _RollBack,
}


def _closes(statement: cst.SimpleStatementLine) -> bool:
    """Return whether closing is all that *statement* does."""
    line = statement.body[0]
    value = line.value if isinstance(line, cst.Expr) else None
    call = value.expression if isinstance(value, cst.Await) else value
    function = call.func if isinstance(call, cst.Call) else None
    return (
        len(statement.body) == 1
        and isinstance(function, cst.Attribute)
        and function.attr.value in {"close", "aclose"}
    )


def _with_argument(call: cst.Call, name: str, value: cst.BaseExpression) -> list[cst.Arg]:
    """Return the arguments of *call* and ``name=value``, laid out as they are."""
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    added = cst.Arg(value, cst.Name(name), equal)
    if not call.args:
        return [added]
    *before, last = call.args
    if isinstance(last.comma, cst.Comma):
        between, end = _commas(call, last.comma)
        return [*before, last.with_changes(comma=between), added.with_changes(comma=end)]
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    plain = last.with_changes(comma=comma, whitespace_after_arg=cst.SimpleWhitespace(""))
    return [
        *before,
        plain,
        added.with_changes(whitespace_after_arg=last.whitespace_after_arg),
    ]


def _commas(call: cst.Call, last: cst.Comma) -> tuple[cst.Comma, cst.Comma]:
    """Return the comma before a new argument, and the one after it, where *last* was the last."""
    start, end = call.whitespace_before_args, last.whitespace_after
    if not isinstance(start, cst.ParenthesizedWhitespace) or not isinstance(
        end, cst.ParenthesizedWhitespace
    ):
        return cst.Comma(whitespace_after=cst.SimpleWhitespace(" ")), last
    # A line of its own; the comment stays behind the argument that it is about.
    between = start.with_changes(first_line=end.first_line, empty_lines=[])
    closing = end.with_changes(first_line=cst.TrailingWhitespace())
    return cst.Comma(whitespace_after=between), cst.Comma(whitespace_after=closing)


def _names(call: cst.Call, message: str) -> bool:
    """Return whether *call* depends on the provider that *message* is about."""
    provider = message.partition("`")[2].partition("`")[0]
    if not call.args:
        return False
    text = cst.Module([]).code_for_node(call.args[0].value)
    return text.rpartition(".")[2] == provider
