"""What a server is started with, and what it answers with."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict
from sqlalchemy import URL, make_url


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    url: str
    pool_size: int = 5
    max_overflow: int = 10
    pool_timeout: float = 5.0
    query_seconds: float = 0.02

    @property
    def limit(self) -> int:
        """Return how many connections there may be."""
        return self.pool_size + self.max_overflow

    @property
    def pool(self) -> dict[str, Any]:
        """Return the pool's size as engine options."""
        return {"pool_size": self.pool_size, "max_overflow": self.max_overflow}

    @classmethod
    def loads(cls, text: str) -> Self:
        """Read what `dumps` wrote."""
        return cls(**json.loads(text))

    def dumps(self) -> str:
        """Write the settings for a command line."""
        return json.dumps(asdict(self))


class ItemOut(BaseModel):
    """An item as the client sees it."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str


def for_asyncpg(url: str) -> tuple[URL, dict[str, Any]]:
    """Return the URL for asyncpg, and the connect arguments for what it does not read there."""
    given = make_url(url)
    application = {"application_name": given.query.get("application_name", "")}
    bare = given.set(drivername="postgresql+asyncpg", query={})
    return bare, {"server_settings": application, "ssl": False}
