"""The pages say what the contract suite shows."""

from pathlib import Path

import pytest

from tests.contract.running import SITES
from tests.contract.table import PAGES, promises, with_table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_is_what_the_suite_has(page: Path) -> None:
    """If not: python -m tests.contract.table."""
    assert page.read_text(encoding="utf-8") == with_table(page)


def test_every_promise_is_told_once() -> None:
    assert len(promises()) >= 10
    assert len(set(promises())) == len(promises())
    assert len({site.name for site in SITES}) == len(SITES)
