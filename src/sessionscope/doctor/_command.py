"""The command ``doctor``: examine a Database where it runs."""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.pool import QueuePool

from sessionscope import AsyncDatabase, Database
from sessionscope.doctor._line import Line
from sessionscope.doctor._pool import Load, connections, waiting
from sessionscope.doctor._servers import Server, examine
from sessionscope.doctor._target import load
from sessionscope.doctor._versions import packages
from sessionscope.exc import ConfigurationError, SessionScopeError

HEALTHY, ILL, UNUSABLE = 0, 1, 2


def doctor(arguments: argparse.Namespace) -> int:
    """Examine a Database, and print one line for each thing that was looked at."""
    try:
        database = load(arguments.target)
        server = _examine(database)
    except (ConfigurationError, SessionScopeError) as error:
        print(f"sessionscope: {error}", file=sys.stderr)
        return UNUSABLE
    lines = list(_lines(database, server, arguments))
    if arguments.format == "json":
        print(json.dumps({"target": arguments.target, "lines": [x.as_dict() for x in lines]}))
    else:
        print(database, *lines, sep="\n")
    return ILL if any(each.level == "bad" for each in lines) else HEALTHY


def _lines(
    database: Database[Any] | AsyncDatabase[Any], server: Server, arguments: argparse.Namespace
) -> Iterator[Line]:
    yield from server.lines
    yield from packages()
    limit = database.stats().limit
    rate = arguments.rate
    asked = Load(arguments.processes, rate, arguments.hold)
    if server.room is not None:
        yield connections(limit, asked, server.room)
    pool = database.engine.pool
    timeout = pool.timeout() if isinstance(pool, QueuePool) else 0.0
    yield from waiting(limit, asked, timeout)


def _examine(database: Database[Any] | AsyncDatabase[Any]) -> Server:
    if isinstance(database, AsyncDatabase):
        return asyncio.run(_examine_async(database))
    try:
        with database.engine.connect() as connection:
            return examine(connection)
    finally:
        database.dispose()


async def _examine_async(database: AsyncDatabase[Any]) -> Server:
    try:
        async with database.engine.connect() as connection:
            return await connection.run_sync(_examine_it)
    finally:
        await database.dispose()


def _examine_it(connection: Connection) -> Server:
    return examine(connection)
