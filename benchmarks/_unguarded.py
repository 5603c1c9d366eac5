"""sessionscope without its guards, for which there is no option: to see what they cost."""

from typing import Any


def take_guards_away() -> None:
    """Register no guard from now on, in this process."""
    from sessionscope import _guards, _overlap

    overlap: Any = _overlap
    guards: Any = _guards
    overlap.refuse_overlap = _let_overlap
    guards.refuse_nested = guards.enter = guards.leave = guards._refuse_flush = _do_nothing
    guards._refuse_after_end = _note_use


def _do_nothing(*_: object) -> None: ...


def _note_use(session: Any, transaction: object) -> None:
    # Not a guard: the unit would not end what it does not know of.
    for scope in session.info.values():
        scope.used = True


def _let_overlap(factory: Any, *, is_async: bool) -> None:
    for name in ("reset", "invalidate"):
        setattr(factory.class_, name, _as_guarded(getattr(factory.class_, name)))


def _as_guarded(method: Any) -> Any:
    def call(self: Any) -> None:
        method(self)

    call.unguarded = method  # type: ignore[attr-defined]  # as the guard has it
    return call
