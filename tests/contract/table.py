"""The table of README.md and docs/frameworks.md: `python -m tests.contract.table` writes it.

A row is a test of test_contract.py, by the first line of its docstring; a column is a site. Every
test runs on every site, so that what is in the table is what the suite has shown.
"""

import ast
from pathlib import Path

from tests.contract.running import SITES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "frameworks.md")
BEGIN, END = "<!-- begin: python -m tests.contract.table -->\n", "<!-- end -->\n"


def promises() -> list[str]:
    """Return the first lines of the tests' docstrings, in the order of the file."""
    tree = ast.parse((HERE / "test_contract.py").read_bytes())
    tests = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return [(ast.get_docstring(test) or "").splitlines()[0].rstrip(".") for test in tests]


def table() -> str:
    header = ["", *(site.name for site in SITES)]
    rows = [
        ["the session comes from", *(site.session for site in SITES)],
        ["served by", *(site.server for site in SITES)],
        *([promise, *("yes" for _ in SITES)] for promise in promises()),
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_table(page: Path) -> str:
    """Return the text of a page with the table as it should be."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_table(page), encoding="utf-8")
