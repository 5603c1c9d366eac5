"""The business: every function receives a session; none begins, commits or closes one."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from .models import Item


class NotFound(Exception):
    """There is no such item."""


class NameTaken(Exception):
    """Another item has this name."""


def list_items(session: Session) -> Sequence[Item]:
    """Return all items."""
    return session.scalars(select(Item).order_by(Item.id)).all()


def get_item(session: Session, item_id: int) -> Item:
    """Return the item, or raise NotFound."""
    item = session.get(Item, item_id)
    if item is None:
        raise NotFound(f"there is no item {item_id}")
    return item


def create_item(session: Session, name: str) -> Item:
    """Add an item, or raise NameTaken."""
    item = Item(name=name)
    session.add(item)
    try:
        session.flush()
    except IntegrityError as error:
        raise NameTaken(f"there is an item {name!r} already") from error
    return item
