"""What requests come to over HTTP, counted with sessionscope and with `get_db` by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import psycopg
from sqlalchemy import URL

from benchmarks._claim_routes import TABLES
from benchmarks._load import burst, in_turn, while_streaming
from benchmarks._postgres import conninfo, idle_in_transaction, text
from benchmarks._report import Figure
from benchmarks._servers import Server
from benchmarks._settings import Settings

OURS = "sessionscope"
PATIENCE = 2.0


@dataclass(frozen=True)
class Claim:
    """Something that should never happen, how to count it, and who lets it happen."""

    name: str
    count: Callable[[Server, URL], int]
    by_hand: str


def count_over_http(database: URL) -> list[Figure]:
    """Count each claim with sessionscope and by hand."""
    with psycopg.connect(conninfo(database)) as connection:
        connection.execute(TABLES)
    by_hand = {variant: _counts(variant, database) for variant in {c.by_hand for c in CLAIMS}}
    ours = _counts(OURS, database)
    return [_figure(claim, ours, by_hand[claim.by_hand]) for claim in CLAIMS]


def _figure(claim: Claim, ours: dict[str, int], by_hand: dict[str, int]) -> Figure:
    note = f"{claim.by_hand} {by_hand[claim.name]}"
    return Figure(claim.name, ours[claim.name], "", 0, 0, note=note)


def _counts(variant: str, database: URL) -> dict[str, int]:
    """Count the claims that concern *variant*, on one server."""
    with psycopg.connect(conninfo(database)) as connection:
        connection.execute("TRUNCATE ticket, late")
    claims = [claim for claim in CLAIMS if variant in (claim.by_hand, OURS)]
    with Server(variant, Settings(text(database))) as server:
        return {claim.name: claim.count(server, database) for claim in claims}


def _answered(server: Server, path: str, times: int) -> list[int]:
    return in_turn(server.port, [path.format(n) for n in range(times)], PATIENCE)


def _false_successes(server: Server, database: URL) -> int:
    return sum(200 <= status < 300 for status in _answered(server, "/fails-at-commit/{}", 20))


def _false_tasks(server: Server, database: URL) -> int:
    _answered(server, "/fails-at-commit/{}", 20)
    return _answered(server, "/seen/task-{}", 20).count(200)


def _missed(server: Server, database: URL) -> int:
    paths = [path for n in range(30) for path in (f"/commits-slowly/{n}", f"/stored/late/{n}")]
    return in_turn(server.port, paths, PATIENCE)[1::2].count(404)


def _stored_by_failures(server: Server, database: URL) -> int:
    _answered(server, "/conflicts/{}", 10)
    return _answered(server, "/stored/ticket/{}", 10).count(200)


def _unanswered_pings(server: Server, database: URL) -> int:
    def pings() -> int:
        return 10 - burst(server.port, ["/read"], 10, PATIENCE).ok

    return while_streaming(server.port, "/streams", 20, pings)


def _idle_during_streams(server: Server, database: URL) -> int:
    def idle() -> int:
        return idle_in_transaction(database, server.application)

    return while_streaming(server.port, "/streams", 20, idle)


def _reopened(server: Server, database: URL) -> int:
    _answered(server, "/reads-later/{}", 14)
    return _answered(server, "/seen/read-{}", 14).count(200)


def _unserved_pairs(server: Server, database: URL) -> int:
    return 50 - burst(server.port, ["/two-sessions"], 50, PATIENCE).ok


CLAIMS = [
    Claim("20 requests whose COMMIT fails: answered 2xx", _false_successes, "late-commit"),
    Claim("20 requests whose COMMIT fails: background tasks run", _false_tasks, "late-commit"),
    Claim("30 x GET right after a write answered 200: not found", _missed, "late-commit"),
    Claim("10 requests ending in a handled error: stored", _stored_by_failures, "late-commit"),
    Claim("10 pings during 20 slow streams: not answered", _unanswered_pings, "seed"),
    Claim("20 slow streams: idle in transaction meanwhile", _idle_during_streams, "seed"),
    Claim("14 background tasks with the ended session: read", _reopened, "scope-function"),
    Claim("50 requests with two sessions: not answered 200", _unserved_pairs, "late-commit"),
]
