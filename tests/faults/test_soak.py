"""Some thousand units of work of all sorts leave nothing behind."""

import pytest

from tests.faults import soak


@pytest.mark.usefixtures("postgres_server")  # where there is none, this is skipped
def test_nothing_grows() -> None:
    """The slope of the memory needs more units than there is time for here."""
    report = soak.run(units=2000, seed=1)
    counted = [figure for figure in report.figures if "RSS" not in figure.name]
    assert [figure for figure in counted if figure.verdict == "MISS"] == []
