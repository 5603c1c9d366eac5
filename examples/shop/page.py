"""The start page: what is running, what to try, and the live numbers. It needs no database."""

import platform
from collections.abc import Iterator, Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

from sqlalchemy import Engine

TEMPLATE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
ORDER = '{"user_id": 1, "items": {"1": 2}}'


def render(engine: Engine, openapi: Mapping[str, Any], address: str) -> str:
    """Return the page, with the routes that the application itself describes."""
    return TEMPLATE.substitute(
        versions="".join(f"<li>{escape(text)}</li>" for text in running(engine)),
        commands="".join(map(_command, curl_lines(address))),
        routes="".join(_routes(openapi)),
    )


def curl_lines(address: str) -> list[str]:
    """Return three lines to paste into a terminal."""
    return [
        f"curl {address}items/",
        f"curl {address}users/1",
        f"curl {address}orders -H 'Content-Type: application/json' -d '{ORDER}'",
    ]


def running(engine: Engine) -> list[str]:
    """Name the database and the versions of what serves it."""
    packages = map(_package, ("sessionscope", "SQLAlchemy", "FastAPI"))
    return [kind(engine), *packages, f"Python {platform.python_version()}"]


def kind(engine: Engine) -> str:
    """Say which database this is, without user and password."""
    url = engine.url
    # The version is known from the first connection on.
    number = getattr(engine.dialect, "server_version_info", None) or ()
    name = NAMES.get(url.get_backend_name(), url.get_backend_name())
    place = "/".join(filter(None, [url.host, Path(url.database or "").name]))
    return " ".join(filter(None, [name, ".".join(map(str, number)), place and f"· {place}"]))


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} from this checkout"


def _command(line: str) -> str:
    # The script shows the button where the browser has a clipboard.
    return f'<div class="command"><pre>{escape(line)}</pre><button hidden>Copy</button></div>'


def _routes(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            name = f"<code>{escape(path)}</code>"
            if method == "get" and "{" not in path:
                name = f'<a href="{escape(path.lstrip("/"))}">{name}</a>'
            yield f"<tr><td>{method.upper()}</td><th scope='row'>{name}</th>"
            yield f"<td>{escape(operation['description'])}</td></tr>"
