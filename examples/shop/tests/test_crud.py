"""The business functions, with sessions that somebody else ends."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from threading import Barrier

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from shop import crud
from shop.models import Item, Order, today
from shop.tests.conftest import Shop

TEAPOT, CUP, STRAINER, KETTLE, STAND = range(1, 6)


def stock(shop: Shop, item_id: int) -> int:
    """Return what is left of an item."""
    with shop.database.begin(read_only=True) as session:
        return crud.get_item(session, item_id).stock


def at_once(shop: Shop, number: int, act: Callable[[Session, int], object]) -> list[str]:
    """Do *act* in *number* threads that start together; return how each ended."""
    barrier = Barrier(number)

    def unit(n: int) -> str:
        barrier.wait()
        try:
            with shop.database.begin() as session:
                act(session, n)
        except crud.OutOfStock:
            return "out of stock"
        return "done"

    with ThreadPoolExecutor(number) as threads:
        return sorted(threads.map(unit, range(number)))


def test_an_order_takes_its_items_from_the_shelf(shop: Shop) -> None:
    """The total is in cents, and the objects stay readable after the unit of work."""
    with shop.database.begin() as session:
        order = crud.place_order(session, 1, {CUP: 3, TEAPOT: 1})
    assert order.total == 3 * 790 + 2450
    assert [(line.item_id, line.quantity) for line in order.lines] == [(TEAPOT, 1), (CUP, 3)]
    assert (stock(shop, TEAPOT), stock(shop, CUP)) == (499, 1997)


def test_an_order_is_sold_whole_or_not_at_all(shop: Shop) -> None:
    """The teapot goes back on the shelf when there are too few kettles."""
    with (
        pytest.raises(crud.OutOfStock, match="Kettle: 4 wanted, 3 left"),
        shop.database.begin() as session,
    ):
        crud.place_order(session, 1, {TEAPOT: 1, KETTLE: 4})
    assert (stock(shop, TEAPOT), stock(shop, KETTLE)) == (500, 3)
    with shop.database.begin(read_only=True) as session:
        assert session.scalar(select(func.count(Order.id))) == 0


@pytest.mark.parametrize(("user_id", "item_id"), [(99, TEAPOT), (1, 99)])
def test_nobody_and_nothing_cannot_be_sold(shop: Shop, user_id: int, item_id: int) -> None:
    """A user or item that does not exist is named."""
    with pytest.raises(crud.NotFound, match="99"), shop.database.begin() as session:
        crud.place_order(session, user_id, {item_id: 1})


def test_orders_at_the_same_moment_never_oversell(shop: Shop) -> None:
    """Eight buyers want one of three kettles: three get one, five are told."""
    ends = at_once(shop, 8, lambda session, _: crud.place_order(session, 1, {KETTLE: 1}))
    assert ends == ["done"] * 3 + ["out of stock"] * 5
    assert stock(shop, KETTLE) == 0


def test_orders_of_the_same_items_in_opposite_order_do_not_deadlock(shop: Shop) -> None:
    """The items are always taken in one order, whatever order they were asked in."""
    baskets = [{TEAPOT: 1, CUP: 1}, {CUP: 1, TEAPOT: 1}]
    ends = at_once(shop, 8, lambda session, n: crud.place_order(session, 1, baskets[n % 2]))
    assert ends == ["done"] * 8
    assert (stock(shop, TEAPOT), stock(shop, CUP)) == (492, 1992)


def test_restocking_at_the_same_moment_adds_up(shop: Shop) -> None:
    """The database counts, so no delivery is lost."""
    assert at_once(shop, 8, lambda session, _: crud.restock(session, STAND, 5)) == ["done"] * 8
    assert stock(shop, STAND) == 40


def test_only_what_is_sold_out_is_refilled(shop: Shop) -> None:
    """The cake stand is the one item that begins with none."""
    with shop.database.begin() as session:
        refilled = crud.restock_sold_out(session, 10)
    assert [(item.name, item.stock) for item in refilled] == [("Cake stand", 10)]


def test_the_database_itself_refuses_a_negative_stock(shop: Shop) -> None:
    """Code that forgets the check meets the constraint."""
    with (
        pytest.raises(IntegrityError, match="stock_not_negative"),
        shop.database.begin() as session,
    ):
        session.get_one(Item, STAND).stock = -1


def test_revenue_is_the_sum_of_one_day(shop: Shop) -> None:
    """A day without orders has 0, not None."""
    with shop.database.begin() as session:
        crud.place_order(session, 1, {STRAINER: 2})
        crud.place_order(session, 2, {STRAINER: 1})
    with shop.database.begin(read_only=True) as session:
        assert crud.revenue(session, today()) == 3 * 525
        assert crud.revenue(session, date(2000, 1, 1)) == 0
