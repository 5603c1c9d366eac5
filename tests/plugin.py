"""How what a test starts loads the pytest plugin: an installed one is loaded by pytest itself."""

from importlib.metadata import entry_points

_MODULE = "sessionscope.pytest_plugin"
_IS_INSTALLED = any(each.value == _MODULE for each in entry_points(group="pytest11"))

# For the command line of pytest.
PLUGIN: tuple[str, ...] = () if _IS_INSTALLED else ("-p", _MODULE)
