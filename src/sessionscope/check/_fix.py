"""The fixes, made with LibCST: what they do not touch stays as it is, byte for byte."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper

from sessionscope.check._finding import Finding
from sessionscope.check._fix_blocks import Hoist, WrapInWith
from sessionscope.check._fix_places import Fix, assigned, is_call_of


def apply(findings: Iterable[Finding], files: Mapping[str, Path], *, unsafe: bool) -> int:
    """Mend what can be mended in *files* and return how many findings that were.

    A file is written only if it still parses.
    """
    wanted = [f for f in findings if f.fix == "safe" or (unsafe and f.fix == "unsafe")]
    by_file: dict[str, list[Finding]] = {}
    for finding in wanted:
        for path in _files_of(finding):
            by_file.setdefault(path, []).append(finding)
    mended = set[Finding]()
    for path, found in by_file.items():
        if path in files:
            mended |= _mend_file(files[path], path, found)
    return len(mended)


def _files_of(finding: Finding) -> set[str]:
    if finding.code == "SES206":
        return {step.path for step in finding.evidence[1:]}
    return {finding.path}


def _mend_file(file: Path, path: str, findings: Sequence[Finding]) -> set[Finding]:
    source = file.read_bytes()
    mended = set[Finding]()
    # Bottom up, so that the places of the others stay what they are.
    for finding in sorted(findings, key=lambda f: (-f.line, -f.column)):
        changed = mend(source, path, finding)
        if changed != source:
            source = changed
            mended.add(finding)
    for module, name in _needed(mended):
        source = _with_import(source, module, name)  # last, because it moves all lines below
    if mended:
        file.write_bytes(source)
    return mended


def mend(source: bytes, path: str, finding: Finding) -> bytes:
    """Return *source* without *finding*, or as it is where the fix does not fit."""
    try:
        wrapper = MetadataWrapper(cst.parse_module(source))
    except (cst.ParserSyntaxError, UnicodeDecodeError, LookupError):
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
            args=_with_argument(updated_node.args, "poolclass", cst.Name("StaticPool"))
        )


class _DeleteStatement(Fix):
    """SES107: the call that closes goes."""

    def leave_SimpleStatementLine(  # noqa: N802 - LibCST calls it so
        self,
        original_node: cst.SimpleStatementLine,
        updated_node: cst.SimpleStatementLine,
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        start = self.at(original_node)
        if start[0] != self.place[0] or len(original_node.body) != 1:
            return updated_node
        return cst.RemoveFromParent()

    def leave_IndentedBlock(  # noqa: N802 - LibCST calls it so
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if updated_node.body:
            return updated_node
        line = cst.SimpleStatementLine([cst.Pass()])
        return updated_node.with_changes(body=[line])


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
        return updated_node.with_changes(args=_with_argument(updated_node.args, "scope", value))


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


def _with_argument(
    arguments: Sequence[cst.Arg], name: str, value: cst.BaseExpression
) -> list[cst.Arg]:
    """Return *arguments* and ``name=value``, laid out as the last one is."""
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    if not arguments:
        return [cst.Arg(value, cst.Name(name), equal)]
    *before, last = arguments
    if isinstance(last.comma, cst.Comma):
        previous = before[-1].comma if before else cst.MaybeSentinel.DEFAULT
        between = previous if isinstance(previous, cst.Comma) else last.comma
        added = cst.Arg(value, cst.Name(name), equal, comma=last.comma)
        return [*before, last.with_changes(comma=between), added]
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    added = cst.Arg(value, cst.Name(name), equal, whitespace_after_arg=last.whitespace_after_arg)
    plain = last.with_changes(comma=comma, whitespace_after_arg=cst.SimpleWhitespace(""))
    return [*before, plain, added]


def _names(call: cst.Call, message: str) -> bool:
    """Return whether *call* depends on the provider that *message* is about."""
    provider = message.partition("`")[2].partition("`")[0]
    if not call.args:
        return False
    text = cst.Module([]).code_for_node(call.args[0].value)
    return text.rpartition(".")[2] == provider


def _needed(mended: Iterable[Finding]) -> list[tuple[str, str]]:
    """Return the imports, module and name, that fixes have made necessary."""
    needed: dict[tuple[str, str], None] = {}
    for finding in mended:
        if finding.code == "SES304":
            needed["sqlalchemy.pool", "StaticPool"] = None
        if finding.code == "SES105":
            name = "asynccontextmanager" if "async with" in finding.message else "contextmanager"
            needed["contextlib", name] = None
    return sorted(needed)


def _with_import(source: bytes, origin: str, name: str) -> bytes:
    """Return *source* with *name* imported after its other imports."""
    module = cst.parse_module(source)
    if _imports(module, name):
        return source
    line = cst.parse_statement(f"from {origin} import {name}\n")
    places = [n for n, statement in enumerate(module.body) if _is_import(statement)]
    after = places[-1] + 1 if places else 0
    return module.with_changes(body=[*module.body[:after], line, *module.body[after:]]).bytes


def _is_import(statement: cst.BaseStatement) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(
        statement.body[0], cst.Import | cst.ImportFrom
    )


def _imports(module: cst.Module, name: str) -> bool:
    for statement in module.body:
        if not isinstance(statement, cst.SimpleStatementLine):
            continue
        for line in statement.body:
            if not isinstance(line, cst.ImportFrom) or isinstance(line.names, cst.ImportStar):
                continue
            if any(alias.evaluated_name == name for alias in line.names):
                return True
    return False
