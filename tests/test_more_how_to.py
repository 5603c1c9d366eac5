"""The code of the how-to pages on databases and migrations runs, as their reader would run it."""

from pathlib import Path
from textwrap import dedent

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.documents import loaded
from tests.models import Base
from tests.test_how_to import BLOCK, DATABASE, NAME
from tests.test_readme import BLOCKS, MODELS, ROOT, run

PAGES = ROOT / "docs" / "how-to"
# What each page's reader does next, and what is printed then.
ON_EVERY_KIND = {
    "long-reports": """
from database import database
import crud
for name in ("pear", "plum"):
    database.run(crud.add_item, name)
import make_report
print(open("report.csv").read().split())
from fastapi.testclient import TestClient
import main
with TestClient(main.app) as client:
    print(client.get("/report.csv").text.split())
print(database.stats().in_use)
---
2 rows
['1,pear', '2,plum']
['1,pear', '2,plum']
0
""",
    "streams-and-events": """
from database import database
import crud
for name in ("pear", "plum"):
    database.run(crud.add_item, name)
from fastapi.testclient import TestClient
import main
with TestClient(main.app) as client:
    print(client.get("/events", params={"until": 2}).text.splitlines())
    print(client.get("/events", params={"last": 1, "until": 2}).text.splitlines())
---
['id: 1', 'data: pear', '', 'id: 2', 'data: plum', '']
['id: 2', 'data: plum', '']
""",
    "websockets": """
from fastapi.testclient import TestClient
import main
with TestClient(main.app) as client, client.websocket_connect("/items") as socket:
    for name in ("pear", "plum"):
        socket.send_text(name)
        print(socket.receive_json())
---
{'id': 1, 'name': 'pear'}
{'id': 2, 'name': 'plum'}
""",
}
ON_SQLITE = {
    "several-databases": """
from databases import archive, orders
from models import Base
for each in (archive, orders):
    Base.metadata.create_all(each.engine)
from fastapi.testclient import TestClient
import main, script, crud
with TestClient(main.app) as client:
    print(client.post("/items/pear").json())
for each in (archive, orders):
    print([item.name for item in each.run(crud.get_items)])
---
{'id': 2}
['plum', 'pear']
['plum', 'pear']
""",
    "from-get-db": """
from database import SessionLocal, engine
from models import Base
import crud
Base.metadata.create_all(engine)
with SessionLocal() as session:
    crud.add_item(session, "pear")
    session.commit()
    print(len(crud.get_items(session)))
---
1
""",
    "from-flask-sqlalchemy": "import database\nprint(database.database)\n---\nDatabase('sqlite:///shop.db')\n",
    "from-other-libraries": "import database\nprint(database.database)\n---\nDatabase('sqlite:///shop.db')\n",
    "pgbouncer": "import database\nprint(database.database.stats().limit)\n---\n5\n",
    "rotating-credentials": """
import database
open("password.txt", "w").write("secret\\n")
print(database.password())
---
secret
""",
}


PAGES_OF_CODE = [*ON_EVERY_KIND, *ON_SQLITE, "schema-per-tenant", "row-level-security"]


def files_of(page: str, url: str) -> dict[str, str]:
    """Return the files of a page's reader, on the database at *url* unless the page has its own."""
    driver = "postgresql+psycopg" if url.startswith("postgresql") else "sqlite+aiosqlite"
    files = {
        "database.py": DATABASE.format(url=url, driver=driver),
        "models.py": MODELS,
        "crud.py": BLOCKS["crud.py"],
    }
    for block in BLOCK.findall((PAGES / f"{page}.md").read_text(encoding="utf-8")):
        code = dedent(block)  # it may stand in a list
        named = NAME.match(code)
        assert named is not None, f"no file name in the first line of: {code}"
        files[named[1]] = code
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        (folder / name).write_text(code, encoding="utf-8")


def assert_all_ran(page: str, folder: Path) -> None:
    """Fail if a file of the page was written and never loaded."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    named = [NAME.match(dedent(block)) for block in BLOCK.findall(text)]
    assert {each[1].removesuffix(".py") for each in named if each} <= loaded(folder)


@pytest.mark.parametrize("page", ON_EVERY_KIND)
@pytest.mark.parametrize("url", ["sqlite-file", "postgres"], indirect=True)
def test_the_code_of_a_page_works(page: str, url: str, tmp_path: Path) -> None:
    write(tmp_path, files_of(page, url))
    run(
        tmp_path,
        "from database import database; from models import Base\n"
        "Base.metadata.create_all(database.engine)",
    )
    use, _, printed = ON_EVERY_KIND[page].partition("---\n")
    assert run(tmp_path, use) == printed
    assert_all_ran(page, tmp_path)


@pytest.mark.parametrize("page", ON_SQLITE)
def test_the_code_of_a_page_with_a_database_of_its_own_works(page: str, tmp_path: Path) -> None:
    write(tmp_path, files_of(page, "sqlite:///shop.db"))
    use, _, printed = ON_SQLITE[page].partition("---\n")
    assert run(tmp_path, use) == printed
    assert_all_ran(page, tmp_path)


def test_each_tenant_has_its_schema(postgres_url: str, tmp_path: Path) -> None:
    engine = create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    for schema in ("tenant_apple", "tenant_pear"):
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
            mapped = connection.execution_options(schema_translate_map={None: schema})
            Base.metadata.create_all(mapped)
    write(tmp_path, files_of("schema-per-tenant", postgres_url))
    try:
        printed = run(tmp_path, BY_HEADER)
        assert_all_ran("schema-per-tenant", tmp_path)
        assert printed == "['pear']\n['plum']\n404 no such tenant\n"
    finally:
        with engine.begin() as connection:
            for schema in ("tenant_apple", "tenant_pear"):
                connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        engine.dispose()


BY_HEADER = """
from fastapi.testclient import TestClient
import main
with TestClient(main.app) as client:
    client.post("/items/pear", headers={"tenant": "apple"})
    client.post("/items/plum", headers={"tenant": "pear"})
    for tenant in ("apple", "pear"):
        print(client.get("/items", headers={"tenant": tenant}).json())
    refused = client.get("/items", headers={"tenant": "lime"})
    print(refused.status_code, refused.json()["detail"])
"""


def test_rows_are_seen_by_their_tenant_alone(postgres_url: str, tmp_path: Path) -> None:
    """As a role that policies hold for: they do not for superusers, nor for the owner."""
    page = (PAGES / "row-level-security.md").read_text(encoding="utf-8")
    policies = page.partition("```sql\n")[2].partition("```")[0]
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url)
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(text(policies.replace(":", "\\:")))
        connection.execute(text("CREATE ROLE app_of_tenants LOGIN PASSWORD 'app'"))
        connection.execute(text("GRANT ALL ON ALL TABLES IN SCHEMA public TO app_of_tenants"))
        connection.execute(text("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app_of_tenants"))
    mine = url.set(username="app_of_tenants", password="app")
    write(tmp_path, files_of("row-level-security", mine.render_as_string(hide_password=False)))
    try:
        assert run(tmp_path, BY_TENANT) == "['apple-1']\n['pear-1']\nInsufficientPrivilege\n"
        assert_all_ran("row-level-security", tmp_path)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP POLICY own_rows ON item"))
            connection.execute(text("ALTER TABLE item DISABLE ROW LEVEL SECURITY"))
            connection.execute(text("DROP OWNED BY app_of_tenants"))
            connection.execute(text("DROP ROLE app_of_tenants"))
        engine.dispose()


BY_TENANT = """
from fastapi.testclient import TestClient
import main
with TestClient(main.app) as client:
    for tenant in ("apple", "pear"):
        client.post(f"/items/{tenant}-1", headers={"tenant": tenant})
    for tenant in ("apple", "pear"):
        print(client.get("/items", headers={"tenant": tenant}).json())
    try:
        client.post("/items/apple-2", headers={"tenant": "pear"})
    except Exception as error:
        print(type(error.orig).__name__)
"""
