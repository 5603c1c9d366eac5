"""The one Database of this process: one engine pair, one session factory."""

from pathlib import Path

from sqlalchemy import URL

from sessionscope import Database
from sessionscope.exc import ConfigurationError

from .console import stop

# Beside this file, so that the web, the worker and the command line meet in
# one shop whatever directory they were started from.
EMBEDDED = URL.create("sqlite", database=str(Path(__file__).with_name("shop.db")))

try:
    database = Database.from_env("DATABASE_URL", default=EMBEDDED)
except ConfigurationError as error:
    # Every entry point imports this module: a wrong DATABASE_URL ends any of
    # them in one line.
    raise stop(error) from None
