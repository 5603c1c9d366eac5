"""All rules, in order; their modules are loaded when the first rule is asked for."""

from importlib import import_module
from typing import Any

from sessionscope.check._finding import Rule

_FAMILIES = {1: 9, 2: 6, 3: 4, 4: 2}
CODES = tuple(
    f"SES{family}{number:02}" for family, size in _FAMILIES.items() for number in range(1, size + 1)
)
RULES: dict[str, Rule]


def __getattr__(name: str) -> Any:
    if name != "RULES":
        raise AttributeError(name)
    # A run that the cache answers needs no rule.
    modules = (import_module(f"sessionscope.check._rules.{code.lower()}") for code in CODES)
    rules = {module.RULE.code: module.RULE for module in modules}
    globals()["RULES"] = rules
    return rules
