"""docs/frameworks.md says what the contract suite shows."""

from tests.contract.running import SITES
from tests.contract.table import PAGE, page, promises


def test_the_table_is_what_the_suite_has() -> None:
    """If not: python -m tests.contract.table."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_promise_is_told_once() -> None:
    assert len(promises()) >= 10
    assert len(set(promises())) == len(promises())
    assert len({site.name for site in SITES}) == len(SITES)
