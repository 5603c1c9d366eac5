"""The Database of this process. The environment's DATABASE_URL names another one."""

from pathlib import Path

from sessionscope import Database
from sqlalchemy import URL

# Beside the application, whatever folder it is started from.
EMBEDDED = URL.create("sqlite", database=str(Path(__file__).parent.with_name("app.db")))

database = Database.from_env("DATABASE_URL", default=EMBEDDED)
