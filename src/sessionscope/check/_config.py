"""What to check and how: the options, and [tool.sessionscope.check] in pyproject.toml."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from sessionscope.check import _registry
from sessionscope.check._files import folder_of, matches, shown_from
from sessionscope.check._finding import CONFIDENCES, Confidence, Finding, Rule

UNUSED_NOQA = "SES100"
UNUSED_NOQA_PAGE = """\
# SES100 unused-noqa

A comment `# noqa: SES105` in a line without this finding. Delete it: the next real finding in its
line would go unseen. `--ignore SES100` switches this off; with `--select` it is off unless it is
named."""


class UsageError(Exception):
    """An option or a setting that means nothing."""


@dataclass(frozen=True, slots=True)
class Config:
    """Which rules apply, from which confidence on, and what the project's own names mean."""

    select: tuple[str, ...] = ()  # nothing: all but the opt-in ones
    ignore: tuple[str, ...] = ()
    confidence: Confidence | None = None  # None: each rule's own
    per_file_ignores: tuple[tuple[str, tuple[str, ...]], ...] = ()
    factories: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    blocking_calls: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    # What the patterns are relative to, and no setting itself; None: the working directory.
    folder: Path | None = None

    def codes(self) -> list[str]:
        """Return the codes of the rules to apply."""
        return [
            code
            for code, rule in _registry.RULES.items()
            if self._selects(code, rule) and not _meant(code, self.ignore)
        ]

    def _selects(self, code: str, rule: Rule) -> bool:
        """A family does not bring in what is opt-in; its own code does, and ``ALL``."""
        if rule.default == "opt-in":
            return code in self.select or "ALL" in self.select
        return not self.select or _meant(code, self.select)

    def wants(self, finding: Finding) -> bool:
        """Return whether *finding* is sure enough and not ignored in its file."""
        rule = _registry.RULES[finding.code]
        asked = self.confidence
        if asked is None:
            named = _meant(finding.code, self.select)
            asked = "high" if rule.default == "high" and not named else "medium"
        if CONFIDENCES.index(finding.confidence) < CONFIDENCES.index(asked):
            return False
        return not any(
            _meant(finding.code, codes)
            and matches(shown_from(Path(finding.path), self.folder), pattern)
            for pattern, codes in self.per_file_ignores
        )

    def fails(self, finding: Finding) -> bool:
        """Return whether *finding* makes the run fail, which information does not."""
        return not finding.info or _meant(finding.code, self.select)

    def reports_unused_noqa(self) -> bool:
        """Return whether a suppression without a finding is reported."""
        return not _meant(UNUSED_NOQA, self.ignore) and (
            not self.select or _meant(UNUSED_NOQA, self.select)
        )


def _meant(code: str, selectors: Iterable[str]) -> bool:
    """``SES1`` means all rules of that family, ``ALL`` all."""
    return any(code.startswith(selector) or selector == "ALL" for selector in selectors)


def checked(codes: Iterable[str]) -> tuple[str, ...]:
    """Return *codes* if each means a rule."""
    found = tuple(code.strip().upper() for code in codes if code.strip())
    for code in found:
        if code != "ALL" and not any(c.startswith(code) for c in (*_registry.CODES, UNUSED_NOQA)):
            raise UsageError(f"no rule is called {code!r}: `sessionscope rules` lists them")
    return found


def by_project(paths: Iterable[str]) -> list[tuple[Config, list[str]]]:
    """Return the settings that apply to *paths*, each with its paths, inner projects first."""
    known: dict[Path, Config] = {}
    projects: dict[Path | None, tuple[Config, list[str]]] = {}
    for path in paths:
        start = folder_of(path)
        config = known.get(start) or known.setdefault(start, load(start))
        projects.setdefault(config.folder, (config, []))[1].append(path)
    return sorted(projects.values(), key=lambda item: -_depth(item[0].folder))


def _depth(folder: Path | None) -> int:
    return len(folder.parts) if folder is not None else 0


def load(folder: Path) -> Config:
    """Return the settings of the nearest pyproject.toml at or above *folder* that holds any."""
    for place in (folder, *folder.parents):
        file = place / "pyproject.toml"
        if file.is_file() and (table := _table(file)) is not None:
            return replace(_from_table(table, file), folder=place)
    return Config()


def _table(file: Path) -> dict[str, Any] | None:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    for key in ("tool", "sessionscope", "check"):
        if key not in table:
            return None
        inner = table[key]
        if not isinstance(inner, dict):
            raise UsageError(f"{file}: [tool.sessionscope.check] must be a table")
        table = cast("dict[str, Any]", inner)
    return table


def _from_table(table: dict[str, Any], file: Path) -> Config:
    config = Config()
    known = {field.name.replace("_", "-") for field in fields(Config)} - {"folder"}
    for key, value in table.items():
        if key not in known:
            raise UsageError(
                f"{file}: unknown setting {key!r} in [tool.sessionscope.check]; known are "
                + ", ".join(sorted(known))
            )
        try:
            config = replace(config, **{key.replace("-", "_"): _setting(key, value)})
        except (TypeError, UsageError) as error:
            raise UsageError(f"{file}: {key} in [tool.sessionscope.check]: {error}") from error
    return config


def _setting(key: str, value: Any) -> Any:
    if key == "confidence":
        if value not in CONFIDENCES:
            raise TypeError("must be high, medium or low")
        return value
    if key == "per-file-ignores":
        if not isinstance(value, dict):
            raise TypeError('must be a table, like {"app/jobs/*.py" = ["SES106"]}')
        table = cast("dict[str, object]", value)
        patterns = _strings(list(table))
        return tuple((pattern, checked(_strings(table[pattern]))) for pattern in patterns)
    return checked(_strings(value)) if key in {"select", "ignore"} else _strings(value)


def _strings(value: Any) -> tuple[str, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(item, str) and item.strip("/ ") for item in items):
        raise TypeError("must be a list of strings, none of them empty")
    return tuple(map(str, items))
