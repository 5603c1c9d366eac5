"""The business: every function receives a session; none begins, commits or closes one."""

from collections.abc import Mapping, Sequence
from datetime import date

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from .models import Item, Order, OrderLine, User


class ShopError(Exception):
    """The shop refuses; whatever the unit of work did so far is rolled back."""


class NotFound(ShopError):
    """There is no such user, item or order."""


class OutOfStock(ShopError):
    """Fewer items are left than were ordered."""


def get_user(session: Session, user_id: int) -> User:
    """Return the user, or raise NotFound."""
    user = session.get(User, user_id)
    if user is None:
        raise NotFound(f"there is no user {user_id}")
    return user


def get_item(session: Session, item_id: int) -> Item:
    """Return the item as the database has it now, or raise NotFound."""
    item = session.get(Item, item_id, populate_existing=True)
    if item is None:
        raise NotFound(f"there is no item {item_id}")
    return item


def get_order(session: Session, order_id: int) -> Order:
    """Return the order with its lines, or raise NotFound."""
    order = session.get(Order, order_id)
    if order is None:
        raise NotFound(f"there is no order {order_id}")
    return order


def list_users(session: Session) -> Sequence[User]:
    """Return all users."""
    return session.scalars(select(User).order_by(User.id)).all()


def list_items(session: Session) -> Sequence[Item]:
    """Return all items."""
    return session.scalars(select(Item).order_by(Item.id)).all()


def place_order(session: Session, user_id: int, items: Mapping[int, int]) -> Order:
    """Sell *items* (id: quantity) to the user: all of them, or raise and sell none."""
    user = get_user(session, user_id)
    # Everyone takes the items in the same order, so two orders cannot deadlock.
    lines = [_sell(session, item_id, quantity) for item_id, quantity in sorted(items.items())]
    order = Order(user_id=user.id, lines=lines)
    session.add(order)
    session.flush()
    return order


def restock(session: Session, item_id: int, quantity: int) -> Item:
    """Put *quantity* more of the item on the shelf."""
    # Counted by the database: two that restock at once add up.
    add = update(Item).where(Item.id == item_id).values(stock=Item.stock + quantity)
    item: Item | None = session.scalar(add.returning(Item))
    if item is None:
        raise NotFound(f"there is no item {item_id}")
    return item


def restock_sold_out(session: Session, quantity: int) -> Sequence[Item]:
    """Put *quantity* of every sold-out item on the shelf, and return those items."""
    refill = update(Item).where(Item.stock == 0).values(stock=quantity).returning(Item)
    return sorted(session.scalars(refill), key=lambda item: item.id)


def revenue(session: Session, day: date) -> int:
    """Return what was sold on *day*, in cents."""
    sold = func.coalesce(func.sum(OrderLine.price * OrderLine.quantity), 0)
    return session.scalars(select(sold).join(Order).where(Order.day == day)).one()


def _sell(session: Session, item_id: int, quantity: int) -> OrderLine:
    # Check and decrement are one statement: nobody gets in between.
    take = (
        update(Item)
        .where(Item.id == item_id, Item.stock >= quantity)
        .values(stock=Item.stock - quantity)
        .returning(Item.price)
    )
    price = session.scalar(take)
    if price is None:
        item = get_item(session, item_id)
        raise OutOfStock(f"{item.name}: {quantity} wanted, {item.stock} left")
    return OrderLine(item_id=item_id, quantity=quantity, price=price)
