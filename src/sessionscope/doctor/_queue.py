"""How long units of work wait for their turn, at a given load: a simulation.

Units arrive by chance, independently of each other (a Poisson process), wait in one queue, first
come, first served, for one of several slots, and hold it. The formulas of queueing theory need
hold times of a certain shape; a simulation takes those that were given.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat

# Units of work, after those that meet an empty queue: about 1 % of noise in the mean.
_UNITS = 200_000
_WARM_UP = 20_000


@dataclass(frozen=True)
class Waits:
    """What the units of work of one process have to expect, in seconds and shares."""

    mean: float
    p99: float
    refused: float
    """The share that got no slot within pool_timeout."""
    busy: float
    """The share of the slots' time for which they were in use."""


def simulate(
    slots: int, rate: float, holds: Sequence[float], timeout: float, seed: int = 0
) -> Waits:
    """Return how long units wait who arrive *rate* times a second.

    Each holds one of so many *slots* for one of *holds* seconds, and is refused after *timeout*
    seconds in the queue.
    """
    chance = random.Random(seed)  # noqa: S311  # it guards nothing
    gaps = (chance.expovariate(rate) for _ in repeat(None, _WARM_UP + _UNITS))
    free = [0.0] * slots  # when each slot comes free, the earliest first
    waits: list[float] = []
    held = began = ended = 0.0
    for number, now in enumerate(accumulate(gaps)):
        wait = max(0.0, free[0] - now)
        hold = chance.choice(holds)
        if wait <= timeout:
            heapq.heapreplace(free, now + wait + hold)
        if number < _WARM_UP:
            began = now
            continue
        ended = now
        waits.append(wait)
        if wait <= timeout:
            held += hold
    served = sorted(wait for wait in waits if wait <= timeout)
    return Waits(
        mean=sum(served) / len(served) if served else timeout,
        p99=served[int(len(served) * 0.99)] if served else timeout,
        refused=1 - len(served) / len(waits),
        busy=min(1.0, held / ((ended - began) * slots)),
    )
