"""All that is compared: to add a peer, write the function that makes its Site and list it here."""

import importlib
from collections.abc import Callable

from benchmarks._settings import Settings
from benchmarks._subject import Site, Subject

DEF = "FastAPI, def"
ASYNC = "FastAPI, async def"
FLASK = "Flask"
OLDER = "bench-fastapi-sqla"

_DEF, _ASYNC, _FLASK = (
    "benchmarks._def_sites",
    "benchmarks._async_sites",
    "benchmarks._flask_sites",
)

# Ours of each style, with which the others of that style are compared.
OURS = {DEF: "sessionscope", ASYNC: "sessionscope async", FLASK: "sessionscope in Flask"}

_ALL = [
    Subject(OURS[DEF], DEF, f"{_DEF}:sessionscope"),
    Subject(
        "sessionscope read-only",
        DEF,
        f"{_DEF}:sessionscope_read_only",
        note="its sessions refuse to write",
        rival=False,
    ),
    Subject("SQLAlchemy, get_db", DEF, f"{_DEF}:sqlalchemy_get_db"),
    Subject("SQLAlchemy, max_concurrency", DEF, f"{_DEF}:sqlalchemy_bounded"),
    Subject("advanced-alchemy", DEF, f"{_DEF}:advanced_alchemy", ("advanced-alchemy",)),
    Subject("fastapi-sqla", DEF, f"{_DEF}:fastapi_sqla", ("fastapi-sqla", "fastapi"), OLDER),
    Subject("oslo.db", DEF, f"{_DEF}:oslo_db", ("oslo.db",)),
    Subject(
        "psycopg alone", DEF, f"{_DEF}:psycopg_pool", ("psycopg-pool",), asks=False, rival=False
    ),
    Subject(OURS[ASYNC], ASYNC, f"{_ASYNC}:sessionscope"),
    Subject("SQLAlchemy async, get_db", ASYNC, f"{_ASYNC}:sqlalchemy_get_db"),
    Subject("SQLAlchemy async, begin()", ASYNC, f"{_ASYNC}:sqlalchemy"),
    Subject("advanced-alchemy async", ASYNC, f"{_ASYNC}:advanced_alchemy", ("advanced-alchemy",)),
    Subject(
        "fastapi-sqla async", ASYNC, f"{_ASYNC}:fastapi_sqla", ("fastapi-sqla", "fastapi"), OLDER
    ),
    Subject(
        "fastapi-async-sqlalchemy",
        ASYNC,
        f"{_ASYNC}:fastapi_async_sqlalchemy",
        ("fastapi-async-sqlalchemy",),
    ),
    Subject(
        "context-async-sqlalchemy",
        ASYNC,
        f"{_ASYNC}:context_async_sqlalchemy",
        ("context-async-sqlalchemy",),
    ),
    Subject(
        "asyncpg alone", ASYNC, f"{_ASYNC}:asyncpg_pool", ("asyncpg",), asks=False, rival=False
    ),
    Subject(OURS[FLASK], FLASK, f"{_FLASK}:sessionscope", ("flask", "waitress")),
    Subject("flask-sqlalchemy", FLASK, f"{_FLASK}:flask_sqlalchemy", ("flask-sqlalchemy",)),
    Subject(
        "flask-sqlalchemy-lite",
        FLASK,
        f"{_FLASK}:flask_sqlalchemy_lite",
        ("flask-sqlalchemy-lite",),
    ),
]

SUBJECTS = {subject.name: subject for subject in _ALL}


def chosen(*, short: bool) -> list[Subject]:
    """Return all subjects, or a few that cover every style and environment."""
    few = (*OURS.values(), "fastapi-sqla", "SQLAlchemy async, begin()", "flask-sqlalchemy")
    return [subject for subject in _ALL if not short or subject.name in few]


def site(name: str, settings: Settings) -> Site:
    """Make the application of the subject called *name*."""
    module, _, function = SUBJECTS[name].home.partition(":")
    make: Callable[[Settings], Site] = getattr(importlib.import_module(module), function)
    return make(settings)
