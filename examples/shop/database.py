"""The Databases of this process: one for `def`, one for `async def`, on the same tables."""

from pathlib import Path

from sqlalchemy import URL

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import ConfigurationError

from .console import stop

# Beside this file, so that the web, the worker and the command line meet in
# one shop whatever directory they were started from.
EMBEDDED = URL.create("sqlite", database=str(Path(__file__).with_name("shop.db")))

# The asynchronous twin of a driver; psycopg is both.
ASYNC_DRIVERS = {"sqlite": "sqlite+aiosqlite", "sqlite+pysqlite": "sqlite+aiosqlite"}

try:
    database = Database.from_env("DATABASE_URL", default=EMBEDDED)
    url = database.engine.url
    async_database = AsyncDatabase(
        url.set(drivername=ASYNC_DRIVERS.get(url.drivername, url.drivername))
    )
except ConfigurationError as error:
    # Every entry point imports this module: a wrong DATABASE_URL ends any of
    # them in one line.
    raise stop(error) from None
