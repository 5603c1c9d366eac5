"""The arithmetic of the pool: how many connections there may be, and whether they suffice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from sessionscope.doctor._line import Line, line
from sessionscope.doctor._queue import simulate

# Of the slots' time: beyond it, a little more load makes the queue much longer.
_BUSY = 0.8


@dataclass(frozen=True)
class Load:
    """What the application is asked for, as the command line says."""

    processes: int
    rate: float | None
    """Units of work per second, over all processes."""
    holds: Sequence[float]
    """Seconds for which a unit of work holds its connection."""


@dataclass(frozen=True)
class Room:
    """How many connections the server has for the application."""

    most: int
    in_use_by_others: int


def connections(limit: int | None, load: Load, room: Room) -> Line:
    """Compare what all processes together may open with what the server allows."""
    free = room.most - room.in_use_by_others
    if limit is None:
        return line(
            "connections",
            f"the pool has no limit, the server allows {room.most}",
            bad=True,
            mend="Give Database() a pool_size above 0 and a max_overflow of 0 or more",
        )
    wanted = load.processes * (limit + 1)  # one in reserve, for independent units
    each = f"{limit} + 1 in reserve"
    return line(
        "connections",
        f"{load.processes} process{'es' if load.processes > 1 else ''} x ({each}) = {wanted}, "
        f"of {free} that the server has free (max_connections, less what is reserved and "
        f"{room.in_use_by_others} of others)",
        bad=wanted > free,
        mend=f"Lower pool_size + max_overflow to {max(1, free // load.processes - 1)}, raise "
        "max_connections, or put PgBouncer in between (pooler=)",
    )


def waiting(slots: int | None, load: Load, timeout: float) -> Iterator[Line]:
    """Estimate how long units of work wait for a slot, if the load is known."""
    if load.rate is None or slots is None:
        return
    rate = load.rate / load.processes
    waits = simulate(slots, rate, load.holds, timeout)
    enough = _enough(rate, load.holds)
    yield line(
        "waiting",
        f"at {rate:g} units/s in each process, {_mean(load.holds) * 1e3:g} ms each, {slots} slots "
        f"are {waits.busy:.0%} busy: mean wait {_ms(waits.mean)}, 99 % within {_ms(waits.p99)}, "
        f"{waits.refused:.1%} refused after {timeout:g} s",
        bad=waits.refused > 0.001,
        note=waits.busy > _BUSY,
        mend=f"{enough} slots would be {_BUSY:.0%} busy at most: raise pool_size, start more "
        "processes, or hold connections for less time",
    )


def _enough(rate: float, holds: Sequence[float]) -> int:
    return max(1, ceil(rate * _mean(holds) / _BUSY))


def _mean(holds: Sequence[float]) -> float:
    return sum(holds) / len(holds)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
