"""The web side, request by request."""

from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.models import Item


def test_what_was_answered_is_stored(client: TestClient, session: Session) -> None:
    answer = client.post("/items/", json={"name": "pear"})
    assert answer.status_code == 201
    assert session.scalars(select(Item.name)).all() == ["pear"]
    assert client.get("/items/").json() == [answer.json()]
    assert client.get(f"/items/{answer.json()['id']}").json() == answer.json()


def test_a_name_that_is_taken_is_409_and_stores_nothing(client: TestClient) -> None:
    client.post("/items/", json={"name": "pear"})
    answer = client.post("/items/", json={"name": "pear"})
    assert (answer.status_code, answer.json()["detail"]) == (409, "there is an item 'pear' already")
    assert [item["name"] for item in client.get("/items/").json()] == ["pear"]


def test_an_item_that_is_not_there_is_404(client: TestClient) -> None:
    answer = client.get("/items/1")
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no item 1")


def test_what_fits_no_column_is_422(client: TestClient) -> None:
    for name in ("", "x" * 101, "pe\0ar"):
        assert client.post("/items/", json={"name": name}).status_code == 422
    assert client.get(f"/items/{10**30}").status_code == 422


def test_the_health_needs_no_database(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
