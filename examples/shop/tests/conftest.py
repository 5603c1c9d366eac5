"""A shop of its own for every test, on SQLite and on a real PostgreSQL."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from sessionscope import Database
from sessionscope.testing import PostgresServer
from shop.seed import create_and_fill

# The modules that hold on to the process's Database. The others receive what they need.
HOLDERS = ("database", "async_orders", "main", "worker", "cli", "demo")


@dataclass(frozen=True)
class Shop:
    """A shop that is open: its database, filled, and its web application."""

    url: str
    database: Database[Session]
    app: FastAPI


class Run(Protocol):
    """Run ``python -m shop.<module> <arguments>`` to its end."""

    def __call__(
        self, module: str, *arguments: str, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole run."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shop.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database()


def load(url: str, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Import the shop as a new process with this DATABASE_URL would."""
    monkeypatch.setenv("DATABASE_URL", url)
    for name in HOLDERS:
        monkeypatch.delitem(sys.modules, f"shop.{name}", raising=False)
    main = import_module("shop.main")
    return Shop(url, main.database, main.app)


@pytest.fixture
def shop(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A shop with its first goods on the shelves."""
    shop = load(url, monkeypatch)
    create_and_fill(shop.database)
    yield shop
    shop.database.dispose()


@pytest.fixture
def client(shop: Shop) -> Iterator[TestClient]:
    """A client of the shop's web side."""
    with TestClient(shop.app) as client:
        yield client


@pytest.fixture
def environment() -> dict[str, str]:
    """What a command of the shop needs to start, and nothing of the user's settings."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PORT", "DATABASE_URL")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture
def run(environment: dict[str, str]) -> Run:
    """Run a command of the shop in a process of its own."""

    def run(
        module: str, *arguments: str, env: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", f"shop.{module}", *arguments],
            env={**environment, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
