"""The start page."""

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine

from shop import page
from shop.tests.conftest import Shop


def test_it_shows_every_route_and_three_lines_to_paste(client: TestClient, shop: Shop) -> None:
    """The routes come from the application itself, so none is forgotten."""
    text = client.get("/").text
    for path in (
        "/items/",
        "/users/{user_id}",
        "/orders",
        "/orders/{order_id}",
        "/health",
        "/stats",
    ):
        assert f"<code>{path}</code>" in text
    assert text.count("<pre>curl http://testserver/") == 3


def test_it_names_the_database_that_is_used(client: TestClient, shop: Shop) -> None:
    """With the version, which is known from the first connection on."""
    name = {"sqlite": "SQLite 3.", "postgresql": "PostgreSQL "}[shop.database.engine.dialect.name]
    assert f"<li>{name}" in client.get("/").text


def test_it_has_a_place_for_every_number_of_the_stats(client: TestClient) -> None:
    """A number that stats() gains or loses is noticed here."""
    text = client.get("/").text
    for name in client.get("/stats").json():
        assert f'data-stat="{name}"' in text


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql+psycopg://user:secret@db.example/shop", "PostgreSQL · db.example/shop"),
        ("sqlite:////srv/secret/shop.db", "SQLite · shop.db"),
        ("sqlite://", "SQLite"),
    ],
)
def test_it_never_shows_a_user_a_password_or_a_folder(url: str, name: str) -> None:
    """Before the first connection there is no version to show either."""
    assert page.kind(create_engine(url)) == name


def test_an_address_cannot_bring_its_own_markup(client: TestClient) -> None:
    """The Host header is text, whatever it holds."""
    text = client.get("/", headers={"Host": "<script>alert(1)</script>"}).text
    assert "<script>alert" not in text
