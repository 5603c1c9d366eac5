"""Five questions to every subject, answered with counts: does it promise what does not hold?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import psycopg
from sqlalchemy import URL

from benchmarks._bodies import LOST
from benchmarks._claim_routes import TABLES
from benchmarks._environments import CannotRun, serve, why
from benchmarks._load import Pace, in_turn, sustain, while_streaming
from benchmarks._postgres import conninfo, empty_database, idle_in_transaction, text
from benchmarks._report import Figure, Report, Table
from benchmarks._servers import DidNotStart, Server
from benchmarks._settings import Settings
from benchmarks._subject import Subject
from benchmarks._subjects import OURS, SUBJECTS

PATIENCE = 2.0
TIMES = 20
CLIENTS = 200


@dataclass(frozen=True)
class Answer:
    """How often it happened, of how many times."""

    count: int
    of: int
    said: str = ""

    def __str__(self) -> str:
        return f"{'yes' if self.count else 'no'} ({self.said or f'{self.count} of {self.of}'})"


Ask = Callable[[Server, URL], Answer]


def run(*, url: str | None, short: bool) -> Report:
    """Ask every subject that has sessions."""
    report = Report("questions: false promises, and how often")
    table = Table("Each `yes` is a fault; counts in brackets", ["subject", *QUESTIONS])
    report.tables.append(table)
    with empty_database(url) as database:
        with psycopg.connect(conninfo(database)) as connection:
            connection.execute(TABLES)
        pace = Pace(0.6, 1.0, 0.3) if short else Pace(2.0, 5.0, 1.0)
        for subject in SUBJECTS.values():
            if subject.asks and subject.rival:
                _answer(report, table, subject, database, pace)
    return report


def _answer(report: Report, table: Table, subject: Subject, database: URL, pace: Pace) -> None:
    try:
        with serve(subject, Settings(text(database))) as server:
            answers = [ask(server, database) for ask in ASKED]
            # The last one: a server that is wedged answers nothing more.
            answers.insert(2, _wedged(server, pace))
    except (DidNotStart, CannotRun) as error:
        said = why(error)
        table.rows.append([subject.name, said, *[""] * (len(QUESTIONS) - 1)])
        return
    table.rows.append([subject.name, *map(str, answers)])
    if subject.name in OURS.values():
        faults = sum(bool(answer.count) for answer in answers)
        report.figures.append(Figure(f"{subject.name}: faults of five", faults, "", 0, 0))


def _false_successes(server: Server, database: URL) -> Answer:
    statuses = in_turn(server.port, ["/fails-at-commit"] * TIMES, PATIENCE)
    return Answer(sum(200 <= status < 300 for status in statuses), TIMES)


def _silently_rolled_back(server: Server, database: URL) -> Answer:
    before = _stored(database)
    answered = in_turn(server.port, ["/swallows"] * TIMES, PATIENCE).count(200)
    return Answer(answered - (_stored(database) - before), TIMES)


def _stored(database: URL) -> int:
    with psycopg.connect(conninfo(database)) as connection:
        query = "SELECT count(*) FROM item WHERE name = %s"
        row = connection.execute(query, [LOST]).fetchone()
        return row[0] if row else 0


def _held_in_streams(server: Server, database: URL) -> Answer:
    idle = partial(idle_in_transaction, database, server.application)
    return Answer(while_streaming(server.port, "/streams", TIMES, idle), TIMES)


def _reopened(server: Server, database: URL) -> Answer:
    return Answer(sum(_reopens(server) for _ in range(TIMES)), TIMES)


def _reopens(server: Server) -> bool:
    in_turn(server.port, ["/keeps"], PATIENCE)
    # Some end their session after the answer was sent: wait until it has certainly ended.
    time.sleep(0.03)
    return in_turn(server.port, ["/reads-kept"], PATIENCE) == [200]


def _wedged(server: Server, pace: Pace) -> Answer:
    tally = sustain(server.port, ["/slow"], CLIENTS, pace)
    return Answer(int(tally.wedged), 1, f"{tally.rate:.0f} req/s")


QUESTIONS = (
    "2xx although COMMIT failed",
    "2xx after a swallowed error, nothing stored",
    f"wedged at {CLIENTS} clients",
    "transaction held while streaming",
    "ended session reopens",
)
# In this order, all but the one about clients.
ASKED: tuple[Ask, ...] = (_false_successes, _silently_rolled_back, _held_in_streams, _reopened)
