"""Some hundred units of work of all sorts leave nothing behind."""

from sessionscope.testing import PostgresServer
from tests.faults import soak


def test_nothing_grows(postgres_server: PostgresServer) -> None:
    """What memory they take needs more units than there is time for here."""
    report = soak.run(units=600, seed=1, server=postgres_server, count=4)
    counted = [f for f in report.figures if "RSS" not in f.name and "objects" not in f.name]
    assert len(counted) >= 18
    assert [figure for figure in counted if figure.verdict == "MISS"] == []
