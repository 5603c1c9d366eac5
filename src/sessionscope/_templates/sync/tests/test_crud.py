"""The business, with a session of the test's own."""

import pytest
from sqlalchemy.orm import Session

from app import crud


def test_items_are_listed_in_the_order_of_their_making(session: Session) -> None:
    for name in ("pear", "apple"):
        crud.create_item(session, name)
    assert [item.name for item in crud.list_items(session)] == ["pear", "apple"]


def test_a_name_is_taken_once(session: Session) -> None:
    crud.create_item(session, "pear")
    with pytest.raises(crud.NameTaken, match="'pear'"):
        crud.create_item(session, "pear")


def test_an_item_that_is_not_there_is_not_found(session: Session) -> None:
    with pytest.raises(crud.NotFound, match="no item 1"):
        crud.get_item(session, 1)
