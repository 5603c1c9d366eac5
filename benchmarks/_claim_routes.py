"""Routes on which it shows when and how a request's session ends."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.orm import Session

from benchmarks._model import FIRST

STREAM_SECONDS = 4.0

# COMMIT fails for tickets with the same number, and takes long for late ones.
TABLES = """
CREATE TABLE ticket (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE late (number integer);
CREATE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN PERFORM pg_sleep(0.15); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER delay AFTER INSERT ON late
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION delay();
"""


class Conflict(Exception):
    """What the application answers with 409."""


async def _answer_409(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "conflict"}, status_code=409)


def add_claim_routes(app: FastAPI, dependency: Any, again: Any) -> None:
    """Add the routes; *again* is the dependency for a second session of the same request."""
    app.add_exception_handler(Conflict, _answer_409)
    seen: set[str] = set()
    _add_writes(app, dependency, seen)
    _add_late_uses(app, dependency, seen)

    def user(db: Annotated[Session, again]) -> int:
        return db.scalars(FIRST).one().id

    @app.get("/two-sessions")
    def two_sessions(
        db: Annotated[Session, dependency], user: Annotated[int, Depends(user)]
    ) -> int:
        return user + db.scalars(FIRST).one().id


def _add_writes(app: FastAPI, dependency: Any, seen: set[str]) -> None:
    insert = {table: text(f"INSERT INTO {table} VALUES (:n)") for table in ("ticket", "late")}
    select = {table: text(f"SELECT 1 FROM {table} WHERE number = :n") for table in insert}

    @app.get("/fails-at-commit/{number}")
    def fails_at_commit(
        number: int, db: Annotated[Session, dependency], tasks: BackgroundTasks
    ) -> None:
        db.execute(insert["ticket"], [{"n": number}, {"n": number}])
        tasks.add_task(seen.add, f"task-{number}")

    @app.get("/seen/{what}")
    async def was_seen(what: str) -> None:
        if what not in seen:
            raise HTTPException(404)

    @app.get("/commits-slowly/{number}")
    def commits_slowly(number: int, db: Annotated[Session, dependency]) -> None:
        db.execute(insert["late"], {"n": number})

    @app.get("/conflicts/{number}")
    def conflicts(number: int, db: Annotated[Session, dependency]) -> None:
        db.execute(insert["ticket"], {"n": number})
        raise Conflict

    @app.get("/stored/{table}/{number}")
    def stored(table: str, number: int, db: Annotated[Session, dependency]) -> None:
        if db.scalars(select[table], {"n": number}).first() is None:
            raise HTTPException(404)


def _add_late_uses(app: FastAPI, dependency: Any, seen: set[str]) -> None:
    @app.get("/streams")
    def streams(db: Annotated[Session, dependency]) -> StreamingResponse:
        db.scalars(FIRST).one()
        return StreamingResponse(_slowly())

    @app.get("/reads-later/{number}")
    def reads_later(
        number: int, db: Annotated[Session, dependency], tasks: BackgroundTasks
    ) -> None:
        def read() -> None:
            db.scalars(FIRST).one()
            seen.add(f"read-{number}")

        tasks.add_task(read)


async def _slowly() -> AsyncIterator[bytes]:
    yield b"begun"
    await asyncio.sleep(STREAM_SECONDS)
    yield b"done"
