"""The program waits for something else inside an open transaction.

## What it does

Flags HTTP calls, LLM calls, ``sleep``, mail and subprocesses between the first statement of a
session and its commit, rollback or close. The list of calls can be extended (``blocking-calls``).

It does not flag a wait that holds an advisory lock, nor one after reads alone in a command, whose
connection nobody waits for, or where each engine of the project is one of SQLite.

## Why it bites in production

While the other side takes its time the connection is "idle in transaction": its locks are held,
VACUUM cannot clean up, and fifteen slow answers empty the pool: "QueuePool limit of size 5
overflow 10 reached" for requests that would not even have called the other side.

## Example

```python
order = session.get(Order, order_id)
requests.post(PAYMENT_URL, json=order.payload())
order.paid = True
session.commit()
```

## Use instead

```python
payload = session.get(Order, order_id).payload()
session.commit()  # ends the transaction, and gives the connection back
requests.post(PAYMENT_URL, json=payload)
```

## When to ignore

Where the call is always fast, or the lock is wanted.
"""

import ast
import re
from collections.abc import Iterator

from sessionscope.check._dialects import speaks_sqlite_alone
from sessionscope.check._facts import STATEMENTS, Block, CallFact, Scope, Use, position, words
from sessionscope.check._finding import Finding, Rule
from sessionscope.check._model import Because, Model
from sessionscope.check._values import Value

_MODULES = (
    *(
        f"{name}."
        for name in words(
            "requests httpx aiohttp urllib.request urllib3 subprocess smtplib aiosmtplib openai "
            "anthropic litellm boto3 aioboto3 stripe twilio sendgrid google.generativeai "
            "google.genai cohere mistralai groq ollama replicate slack_sdk paramiko"
        )
    ),
    "langchain",
    "llama_index",
    "asyncio.create_subprocess",
)
_CALLS = frozenset({"time.sleep", "asyncio.sleep", "os.system", "anyio.sleep", "trio.sleep"})
_VERBS = words(
    "get post put patch delete head options request send urlopen run call check_call check_output "
    "Popen create sendmail send_message stream completion acompletion urlretrieve communicate "
    "create_subprocess_exec create_subprocess_shell embeddings embedding generate_content "
    "generate_content_async invoke ainvoke chat generate agenerate chat_postMessage parse acreate "
    "put_object get_object upload_file upload_fileobj download_file download_fileobj head_object "
    "delete_object list_objects_v2 send_email publish invoke_model exec_command embed_query "
    "embed_documents aembed_query aembed_documents"
)
_STRAIGHT = frozenset({"body", "with", "try", "else", "loop"})
_ENDS = frozenset({"commit", "rollback", "close", "aclose", "remove", "invalidate"})
_LOCK = re.compile(r"(?i)advisory_(xact_)?lock|\bget_lock\b")
_WRITES = words(
    "add add_all delete flush merge execute exec bulk_save_objects bulk_insert_mappings "
    "bulk_update_mappings"
)
_SILENT = frozenset(
    {
        "add",
        "add_all",
        "expunge",
        "expire",
        "begin",
        "begin_nested",
        "delete",
        "expunge_all",
        "expire_all",
    }
)


def judge(model: Model) -> Iterator[Finding]:
    """Find waits that keep a transaction open."""
    sqlite_alone = speaks_sqlite_alone(model)
    for scope in model.functions:
        uses = model.session_uses(scope)
        if not uses:
            continue
        # SQLite's drivers open no transaction for reads, and nobody waits for a command's.
        lenient = sqlite_alone or model.in_context(scope) == "command"
        told = set[str]()
        for call in scope.calls:
            what = _blocks(model, scope, call)
            if what is None:
                continue
            for path in dict.fromkeys(path for path, _, _ in uses):
                first = _open_at(scope, path, call, uses)
                if first is None or _takes_lock(first):
                    continue
                if lenient and not _writes_before(path, call, uses):
                    continue
                if path not in told:
                    told.add(path)
                    yield _finding(model, scope, call, what, first)


def _takes_lock(use: Use) -> bool:
    """An advisory lock is the connection's, and held for as long as the work takes."""
    return _LOCK.search(ast.unparse(use.node)) is not None


def _writes_before(path: str, call: CallFact, uses: list[tuple[str, Use, Value]]) -> bool:
    return any(
        other == path and use.name in _WRITES and position(use.node) < position(call.node)
        for other, use, _ in uses
    )


def _blocks(model: Model, scope: Scope, call: CallFact, depth: int = 0) -> str | None:
    """Return what the program waits for in *call*, if it does."""
    function = call.node.func
    name = _name_of(model, function, scope)
    last = name.rpartition(".")[2]
    if name in _CALLS or name in model.blocking:
        return None if _is_instant(call.node) else name
    if name.startswith(_MODULES) and last in _VERBS and ".Response." not in name:
        return name
    if depth >= 2 or not isinstance(function, ast.Name | ast.Attribute):
        return None
    target = model.called(call.node, scope)
    if target is None or target.kind != "function" or (target.is_async and call.role != "await"):
        return None
    return _waits(model, target, depth)


def _waits(model: Model, target: Scope, depth: int) -> str | None:
    """Return what the function *target* waits for on its straight way through."""
    key = ("waits", depth)
    if key not in target.memo:
        target.memo[key] = None
        if target.module.relevant and not model.session_uses(target):
            target.memo[key] = next(
                (
                    what
                    for inner in target.calls
                    if all(b.kind in _STRAIGHT for b in inner.block.chain())
                    and (what := _blocks(model, target, inner, depth + 1)) is not None
                ),
                None,
            )
    found = target.memo[key]
    return found if isinstance(found, str) else None


def _name_of(model: Model, function: ast.expr, scope: Scope) -> str:
    """Return the library's name of what is called, through clients made from its classes."""
    if isinstance(function, ast.Attribute):
        base = _base_name(model, function.value, scope)
        return f"{base}.{function.attr}" if base else ""
    return model.external(function, scope)


def _base_name(model: Model, node: ast.expr, scope: Scope) -> str:
    known = model.external(node, scope)
    if known:
        return "" if known.startswith("<") else known
    if isinstance(node, ast.Attribute):
        base = _base_name(model, node.value, scope)
        return f"{base}.{node.attr}" if base else ""
    if isinstance(node, ast.Call):  # boto3.client("s3")
        return model.external(node.func, scope)
    if isinstance(node, ast.Name):
        bound = next((s.bindings[node.id] for s in scope.around() if node.id in s.bindings), None)
        made = bound[-1].value if bound and bound[-1].kind in {"value", "with"} else None
        if isinstance(made, ast.Call):
            return model.external(made.func, scope)
    return ""


def _is_instant(node: ast.Call) -> bool:
    return bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0


def _open_at(
    scope: Scope, path: str, call: CallFact, uses: list[tuple[str, Use, Value]]
) -> Use | None:
    """Return the statement that opened the transaction in which *call* stands."""
    here = position(call.node)
    first: Use | None = None
    for other, use, _ in uses:
        if other != path or position(use.node) >= here:
            continue
        if use.name in _ENDS:
            if not any(b.kind == "except" for b in _between(use.block, call.block)):
                first = None
        elif (
            use.name not in _SILENT and use.name in STATEMENTS and _leads_to(use.block, call.block)
        ):
            first = first or use
    if first is None or _left_block(scope, path, first, call) or _rebound(scope, path, first, here):
        return None
    return first


def _between(inner: Block, outer: Block) -> list[Block]:
    around = list(outer.chain())
    return [b for b in inner.chain() if b not in around]


def _leads_to(block: Block, target: Block) -> bool:
    """Return whether what ran in *block* is sure to have run before *target*."""
    return all(
        b.kind in {"with", "try", "else", "finally"} for b in _between(block, target)
    ) and not (any(b.kind == "except" for b in _between(target, block)))


def _left_block(scope: Scope, path: str, use: Use, call: CallFact) -> bool:
    """Return whether the session's ``with`` block ended between the two."""
    for block in use.block.chain():
        if block.kind == "with" and isinstance(block.node, ast.With | ast.AsyncWith):
            names = {ast.unparse(i.optional_vars) for i in block.node.items if i.optional_vars}
            text = " ".join(ast.unparse(i.context_expr) for i in block.node.items)
            if (path in names or path in text) and block not in call.block.chain():
                return True
    return False


def _rebound(scope: Scope, path: str, use: Use, here: tuple[int, int]) -> bool:
    start = position(use.node)
    return any(start < (b.line, b.column) < here for b in scope.bindings.get(path, ()))


def _finding(model: Model, scope: Scope, call: CallFact, what: str, first: Use) -> Finding:
    return model.finding(
        RULE,
        scope,
        call.node,
        f"`{what}` is waited for inside the transaction that began in line "
        f'{first.node.lineno}: meanwhile its connection is "idle in transaction" and missing '
        "from the pool. Commit or close first, or wait before the first statement",
        confidence="medium",
        because=[
            Because(scope, first.node, "the transaction begins here"),
            Because(scope, call.node, f"and waits for `{what}` here"),
        ],
    )


RULE = Rule("SES401", "io-in-transaction", "info", judge)
