"""Whom a swallowed error harms, where the whole program has to be known."""

import pytest

from sessionscope.check import Config, check_source

HEAD = """
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker
"""
READ = """
def read(session: Session):
    try:
        session.execute(select(1))
    except OperationalError:
        print("no such table")
    return session.execute(select(2)).all()
"""
SAVE = """
def save(session: Session, row):
    try:
        session.add(row)
        session.commit()
    except OperationalError:
        print("locked")
    return session.execute(select(2)).all()
"""


def lines(source: str) -> list[int]:
    """Return the lines that are found, from the end of the head on."""
    found = check_source(HEAD + source, "app.py", Config(select=("SES402",)))
    return [finding.line - HEAD.count("\n") for finding in found]


SQLITE = [
    'engine = create_engine("sqlite:///shop.db")',
    'url = "sqlite:///shop.db"\nengine = create_engine(url, echo=True)',
    """
class Manager:
    def __init__(self):
        self.url: str = ""

    def start(self, name):
        if not self.url:
            self.url = f"sqlite:///{name}"
        self.engine = create_engine(self.url)
""",
]
OTHERS = [
    'engine = create_engine("postgresql+psycopg://localhost/shop")',
    "engine = create_engine(url)",
    "def start(url):\n    return create_engine(url)",
    'import os\nURL = os.getenv("URL", "sqlite:///shop.db")\nengine = create_engine(URL)',
    'engine = create_engine(conf.url, connect_args=options if "sqlite" in conf.url else {})',
    """
class Manager:
    def __init__(self, url):
        self.url = url

    def start(self, name):
        if not self.url:
            self.url = f"sqlite:///{name}"
        self.engine = create_engine(self.url)
""",
]


@pytest.mark.parametrize("engine", SQLITE)
def test_a_failed_read_harms_nobody_where_all_engines_are_sqlites(engine: str) -> None:
    """The URL may have been put together elsewhere; a commit that fails harms on any database."""
    assert lines(READ + engine) == []
    assert lines(SAVE + engine) == [5]


@pytest.mark.parametrize("engine", OTHERS)
def test_a_failed_read_harms_where_an_engine_may_be_another(engine: str) -> None:
    assert lines(READ + engine) == [4]


RESILIENT = """
class Resilient(Session):
    def execute(self, *args, **options):
        try:
            return super().execute(*args, **options)
        except Exception:
            self._safe_rollback()
            raise
"""


def test_a_session_class_that_rolls_back_itself_is_believed() -> None:
    """It has overridden ``execute()``, not ``commit()``."""
    factory = "SessionLocal = sessionmaker(class_=Resilient)\n"
    assert lines(RESILIENT + factory + READ) == []
    assert len(lines(RESILIENT + factory + SAVE)) == 1
    assert len(lines(RESILIENT + "SessionLocal = sessionmaker()\n" + READ)) == 1
    assert len(lines(RESILIENT + factory + "OtherLocal = sessionmaker()\n" + READ)) == 1


PROGRAM = """
from fastapi import FastAPI

app = FastAPI()

@app.get("/")
def root():
    return {}

def nobody_calls_it(session: Session, row):
    try:
        session.commit()
    except OperationalError:
        return None
    return row
"""


def test_what_nobody_calls_harms_nobody_in_a_program_that_is_here_as_a_whole() -> None:
    """Without an entry point it may be a library, whose callers are elsewhere."""
    assert lines(PROGRAM) == []
    assert len(lines(PROGRAM.replace("@app.get", "@app.other"))) == 1


STREAM = """
import db

def events():
    try:
        db.session.add(1)
        db.session.commit()
        yield "done"
    except OperationalError:
        yield "failed"

@app.get("/")
def stream():
    return Response(events())
"""


def test_the_end_of_a_stream_is_the_end_of_its_request() -> None:
    assert lines(STREAM) == []
    assert len(lines(STREAM.replace('@app.get("/")', ""))) == 1
