"""Commands, scripts and notebook cells: each is one unit of work."""

import ast
import asyncio
import inspect
import os
import signal
from typing import Annotated, Any

import click
import pytest
import typer
from click.testing import CliRunner
from sqlalchemy.orm import Session
from typer.testing import CliRunner as TyperRunner

from sessionscope import AsyncDatabase, Database
from sessionscope.exc import NestedUnit, PoolBusy
from tests.models import Item, create_tables, names


def test_a_click_command_commits_and_then_its_result_is_there(sqlite: Database) -> None:
    @click.group(chain=True)
    def cli() -> None: ...

    @cli.command()
    @click.argument("name")
    @click.option("--times", type=int, default=1)
    @click.pass_context
    @sqlite.with_session()
    def add(session: Session, context: click.Context, name: str, times: int) -> None:
        session.add_all(Item(name=f"{name}{n}") for n in range(times))

    @cli.command()
    def show() -> None:
        click.echo(" ".join(names(sqlite)))

    result = CliRunner().invoke(cli, ["add", "--times", "2", "pear", "show"])
    assert (result.exit_code, result.output) == (0, "pear0 pear1\n")


def test_a_typer_command_shows_its_parameters_without_the_session(sqlite: Database) -> None:
    app = typer.Typer()

    @app.command()
    @sqlite.with_session()
    def add(
        session: Session, name: str, times: Annotated[int, typer.Option(help="How often.")] = 1
    ) -> None:
        """Add items."""
        session.add_all(Item(name=f"{name}{n}") for n in range(times))

    shown = TyperRunner().invoke(app, ["--help"]).output
    assert "Add items." in shown
    assert "How often." in shown
    assert "session" not in shown.lower()
    assert TyperRunner().invoke(app, ["pear", "--times", "2"]).exit_code == 0
    assert names(sqlite) == ["pear0", "pear1"]


@pytest.mark.parametrize("leaving", [click.Abort(), SystemExit(0), ValueError("wrong")], ids=repr)
def test_a_click_command_that_is_left_early_rolls_back(
    sqlite: Database, leaving: BaseException
) -> None:
    """Also with exit code 0: an exception leaves the unit of work."""

    @click.command()
    @sqlite.with_session()
    def add(session: Session) -> None:
        session.add(Item(name="pear"))
        session.flush()
        raise leaving

    result = CliRunner().invoke(add)
    assert (result.exit_code == 0) is isinstance(leaving, SystemExit)
    assert names(sqlite) == []
    assert sqlite.stats().in_use == 0


def test_typer_exit_rolls_back(sqlite: Database) -> None:
    app = typer.Typer()

    @app.command()
    @sqlite.with_session()
    def add(session: Session) -> None:
        session.add(Item(name="pear"))
        session.flush()
        raise typer.Exit

    assert TyperRunner().invoke(app).exit_code == 0
    assert names(sqlite) == []


def test_ctrl_c_rolls_back(sqlite: Database) -> None:
    with pytest.raises(KeyboardInterrupt), sqlite.begin() as session:
        session.add(Item(name="pear"))
        session.flush()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was not interrupted")
    assert names(sqlite) == []


class Notebook:
    """Runs cells as Jupyter does: each in a task of its own, on a loop that goes on."""

    def __init__(self, **names: Any) -> None:
        self.names = names

    async def run(self, code: str) -> None:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        cell = compile(inspect.cleandoc(code), "cell", "exec", flags=flags)
        await asyncio.create_task(self._run(cell))

    async def _run(self, cell: Any) -> None:
        result = eval(cell, self.names)
        if inspect.isawaitable(result):
            await result


def test_cells_open_units_of_both_kinds(sqlite: Database) -> None:
    async def main() -> None:
        with_driver = sqlite.engine.url.set(drivername="sqlite+aiosqlite")
        async with AsyncDatabase(with_driver) as async_database:
            notebook = Notebook(database=sqlite, async_database=async_database, Item=Item)
            await notebook.run("""
                with database.begin() as session:
                    session.add(Item(name="pear"))
            """)
            await notebook.run("""
                async with async_database.begin() as session:
                    session.add(Item(name="plum"))
            """)
            await notebook.run("items = database.run(lambda session: session.query(Item).all())")
            assert [item.name for item in notebook.names["items"]] == ["pear", "plum"]

    asyncio.run(main())


def test_a_unit_that_a_cell_left_open_is_in_the_way_of_the_next_only_if_it_must_wait(
    sqlite_url: str,
) -> None:
    """Each cell is a flow of its own; the loop that it runs on never blocks."""
    with Database(sqlite_url, pool_size=1, max_overflow=0) as database:
        create_tables(database)

        async def main() -> None:
            notebook = Notebook(database=database)
            await notebook.run("unit = database.begin(); session = unit.__enter__()")
            with pytest.raises(PoolBusy, match="event loop"):
                await notebook.run("database.begin().__enter__()")
            await notebook.run("unit.__exit__(None, None, None)")
            await notebook.run("with database.begin(): pass")
            with pytest.raises(NestedUnit):
                await notebook.run("with database.begin(), database.begin(): pass")

        asyncio.run(main())
        assert database.stats().in_use == 0
