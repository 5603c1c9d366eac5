"""The web side, request by request."""

import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from fastapi.testclient import TestClient

from shop.tests.conftest import Shop, load

TEAPOT, KETTLE = 1, 4


def stock(client: TestClient) -> dict[int, int]:
    """Return what is left of every item."""
    return {item["id"]: item["stock"] for item in client.get("/items/").json()}


def test_the_shelves_are_shown(client: TestClient) -> None:
    """The route of the tutorial, with the fields of its schema."""
    teapot = {"id": TEAPOT, "name": "Teapot", "price": 2450, "stock": 500}
    assert client.get("/items/").json()[0] == teapot


def test_a_user_is_shown_or_not_found(client: TestClient) -> None:
    """What the business calls NotFound is 404."""
    assert client.get("/users/1").json()["email"] == "ada@example.org"
    answer = client.get("/users/99")
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no user 99")


def test_an_order_can_be_read_as_soon_as_it_is_answered(client: TestClient) -> None:
    """201 means committed."""
    placed = client.post("/orders", json={"user_id": 1, "items": {TEAPOT: 2}})
    assert placed.status_code == 201
    assert placed.json()["total"] == 4900
    assert client.get(f"/orders/{placed.json()['id']}").json() == placed.json()
    assert stock(client)[TEAPOT] == 498


def test_both_styles_sell_from_the_same_shelves(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """What `async def` sells, `def` reads, and the other way round."""
    with caplog.at_level(logging.INFO, "shop"):
        placed = client.post("/async/orders", json={"user_id": 1, "items": {TEAPOT: 2}})
    assert placed.status_code == 201
    assert caplog.messages == [f"order {placed.json()['id']} is committed: tell the customer"]
    assert client.get(f"/orders/{placed.json()['id']}").json() == placed.json()
    sold = client.post("/orders", json={"user_id": 1, "items": {TEAPOT: 1}}).json()["id"]
    assert client.get(f"/async/orders/{sold}").json()["total"] == 2450
    assert client.get("/async/items/").json() == client.get("/items/").json()
    refused = client.post("/async/orders", json={"user_id": 1, "items": {TEAPOT: 1, KETTLE: 4}})
    assert refused.status_code == 409
    assert stock(client)[TEAPOT] == 497


def test_out_of_stock_is_409_and_leaves_nothing_behind(client: TestClient) -> None:
    """The handler answers after the session was rolled back."""
    answer = client.post("/orders", json={"user_id": 1, "items": {TEAPOT: 2, KETTLE: 4}})
    assert answer.status_code == 409
    assert answer.json()["detail"] == "Kettle: 4 wanted, 3 left"
    assert (stock(client)[TEAPOT], stock(client)[KETTLE]) == (500, 3)
    assert client.get("/orders/1").status_code == 404


def test_the_customer_is_told_of_committed_orders_only(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The after_commit hook of a refused order never runs."""
    with caplog.at_level(logging.INFO, "shop"):
        client.post("/orders", json={"user_id": 1, "items": {KETTLE: 4}})
        assert caplog.messages == []
        number = client.post("/orders", json={"user_id": 1, "items": {KETTLE: 3}}).json()["id"]
        assert caplog.messages == [f"order {number} is committed: tell the customer"]


@pytest.mark.parametrize(
    "order",
    [
        {"user_id": 1, "items": {}},
        {"user_id": 1, "items": {TEAPOT: 0}},
        {"user_id": 1, "items": {10**30: 1}},
        {"user_id": 10**30, "items": {TEAPOT: 1}},
    ],
)
def test_an_order_that_makes_no_sense_is_422(client: TestClient, order: dict[str, object]) -> None:
    """Numbers that fit no column are refused before the database sees them."""
    assert client.post("/orders", json=order).status_code == 422
    assert client.get(f"/users/{10**30}").status_code == 422


def test_requests_at_the_same_moment_never_oversell(client: TestClient) -> None:
    """Eight customers, three kettles."""
    barrier = Barrier(8)

    def buy(_: int) -> int:
        barrier.wait()
        return client.post("/orders", json={"user_id": 1, "items": {KETTLE: 1}}).status_code

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(buy, range(8))) == [201] * 3 + [409] * 5
    assert stock(client)[KETTLE] == 0


def test_the_stats_count_the_units_of_work(client: TestClient, shop: Shop) -> None:
    """One read and one refused order: two begun, one rolled back."""
    before = client.get("/stats").json()
    client.get("/items/")
    client.post("/orders", json={"user_id": 1, "items": {KETTLE: 4}})
    after = client.get("/stats").json()
    assert after["begun"] - before["begun"] == 2
    assert after["rolled_back"] - before["rolled_back"] == 1
    assert (after["in_use"], after["waiting"]) == (0, 0)


def test_without_a_database_the_shop_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no session works; what needs one is 503 and says when to come back."""
    shop = load("postgresql+psycopg://shop:secret@127.0.0.1:1/shop", monkeypatch)
    client = TestClient(shop.app)
    for path in ("/", "/health", "/stats"):
        assert client.get(path).status_code == 200
    answer = client.get("/items/")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "secret" not in client.get("/").text + answer.text
