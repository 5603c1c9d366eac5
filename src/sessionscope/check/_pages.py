"""The rules' pages: ``python -m sessionscope.check._pages docs/rules`` writes them."""

import sys
from pathlib import Path

from sessionscope.check._finding import Rule
from sessionscope.check._registry import RULES

_DEFAULTS = {
    "on": "on",
    "high": "on, where it is certain",
    "info": "shown for information; does not fail the run unless it is selected",
    "opt-in": "off; `--select` it",
}


def page(rule: Rule) -> str:
    """Return the page of one rule."""
    fix = f"**Fix**: {rule.fix}.  \n" if rule.fix else ""
    default = f"**Default**: {_DEFAULTS[rule.default]}.  \n"
    return f"# {rule.code} {rule.name}\n\n{default}{fix}\n{rule.page}\n"


def index() -> str:
    """Return the list of all rules."""
    rows = [
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.default} | {rule.summary} |"
        for rule in RULES.values()
    ]
    return "\n".join(
        [
            "# The rules of `sessionscope check`",
            "",
            "| code | name | default | |",
            "|---|---|---|---|",
            *rows,
            "",
            "Rules marked *high* speak where they are certain; *info* is shown and does not fail a",
            "run; *opt-in* wants `--select` with its code. SES100 is a `# noqa` comment that",
            "suppresses nothing. [Options, settings and CI](../how-to/check-sources.md).",
            "",
        ]
    )


def write(folder: Path) -> None:
    """Write all pages into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    for rule in RULES.values():
        (folder / f"{rule.code}.md").write_text(page(rule))
    (folder / "README.md").write_text(index())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
