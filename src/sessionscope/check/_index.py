"""Which module an import means, among the files that are checked."""

import posixpath
from collections.abc import Iterator

from sessionscope.check._facts import Binding, Module, words

# Never a file of the project, even where one is called so (``celery.py`` is common).
_FOREIGN = words(
    "sqlalchemy sqlmodel flask_sqlalchemy fastapi starlette flask celery litestar typer click "
    "requests httpx aiohttp asyncio anyio threading multiprocessing concurrent contextlib "
    "functools typing typing_extensions collections os subprocess time urllib openai anthropic "
    "sessionscope dramatiq rq arq taskiq sse_starlette urllib3 smtplib boto3 pytest "
    "alembic"
)


class Index:
    """The modules of a project by path and by dotted name."""

    def __init__(self) -> None:
        self.modules: list[Module] = []
        self._files: dict[str, Module] = {}
        self._packages: set[str] = set()
        self._named: dict[str, Module | None] = {}
        self._found: dict[tuple[str, str], Module | None] = {}

    def add(self, module: Module) -> None:
        """Take *module* in; all must be in before the first is looked for."""
        self.modules.append(module)
        stem = module.path.removesuffix(".py").removesuffix(".pyi")
        folder, _, name = stem.rpartition("/")
        if name == "__init__":
            self._packages.add(folder)
            stem = folder
        self._files[stem] = module
        # A name that two files answer to tells nothing.
        self._named[module.name] = None if module.name in self._named else module

    def imported(self, importer: Module, target: str) -> "tuple[Module, str] | str | None":
        """Return what an import binds: a module and a name in it ("" for itself).

        What lies outside of the project is returned as its dotted name.
        """
        origin, colon, name = target.partition(":")
        if origin.startswith("."):
            module = self._relative(importer, origin)
            if module is None:
                return self._submodule_of_folder(importer, origin, name)
            return module, name
        if origin.partition(".")[0] in _FOREIGN:
            return f"{origin}.{name}" if colon else origin
        module = self.find(importer, origin)
        if module is not None:
            return module, name
        if colon:
            module = self.find(importer, f"{origin}.{name}")
            return (module, "") if module is not None else f"{origin}.{name}"
        return origin

    def submodule(self, module: Module, name: str) -> Module | None:
        """Return the module *name* inside the package *module*."""
        stem = module.path.removesuffix(".py").removesuffix("/__init__")
        return self._files.get(f"{stem}/{name}")

    def find(self, importer: Module, name: str) -> Module | None:
        """Return the module that the absolute *name* means in *importer*."""
        if name.partition(".")[0] in _FOREIGN or name.startswith("<"):
            return None
        folder = importer.folder
        key = folder, name
        if key not in self._found:
            self._found[key] = self._search(importer, folder, name)
        return self._found[key]

    def _search(self, importer: Module, folder: str, name: str) -> Module | None:
        tail = name.replace(".", "/")
        while True:
            # From inside a package its own modules are not top-level names.
            if folder not in self._packages:
                for root in (folder, f"{folder}/src" if folder else "src"):
                    found = self._files.get(f"{root}/{tail}" if root else tail)
                    if found is not None and found is not importer:
                        return found
            if folder in {"", "/"}:
                return self._named.get(name) or self._beside(importer, tail)
            folder = posixpath.dirname(folder)

    def _beside(self, importer: Module, tail: str) -> Module | None:
        """A package whose modules import one another as if run from inside of it."""
        folder = importer.folder
        while folder in self._packages:
            found = self._files.get(f"{folder}/{tail}" if folder else tail)
            if found is not None and found is not importer:
                return found
            if not folder:  # the working directory is a package, and its own parent here
                break
            folder = posixpath.dirname(folder)
        return None

    def _relative(self, importer: Module, origin: str) -> Module | None:
        name = origin.lstrip(".")
        folder = self._folder(importer, len(origin) - len(name))
        stem = f"{folder}/{name.replace('.', '/')}" if name else folder
        return self._files.get(stem.lstrip("/") if not folder else stem)

    def _submodule_of_folder(
        self, importer: Module, origin: str, name: str
    ) -> tuple[Module, str] | None:
        """``from . import x`` in a folder without ``__init__.py``."""
        if origin.strip("."):
            return None
        folder = self._folder(importer, len(origin))
        module = self._files.get(f"{folder}/{name}" if folder else name)
        return (module, "") if module is not None else None

    def _folder(self, importer: Module, level: int) -> str:
        folder = importer.folder
        for _ in range(level - 1):
            folder = posixpath.dirname(folder)
        return folder

    def bindings(self, module: Module, name: str, depth: int = 0) -> list[Binding]:
        """Return what *name* is bound to at the top of *module*, star imports included."""
        found = module.scope.bindings.get(name)
        if found or depth > 4:
            return found or []
        for origin in module.stars:
            target = self.imported(module, origin)
            if isinstance(target, tuple) and (more := self.bindings(target[0], name, depth + 1)):
                return [
                    Binding("import", b.line, b.column, f"{origin}:{name}", b.block)
                    for b in more[-1:]
                ]
        return []

    def importers(self) -> Iterator[tuple[Module, Module]]:
        """Yield (who imports, what is imported) for all imports of the project."""
        for module in self.modules:
            for target in (*module.imports, *module.stars):
                yield from self._targets(module, target)

    def _targets(self, module: Module, target: str) -> Iterator[tuple[Module, Module]]:
        found = self.imported(module, target)
        if isinstance(found, tuple):
            inner = self.submodule(found[0], found[1]) if found[1] else None
            yield module, inner or found[0]


def module_name(path: str, packages: set[str]) -> str:
    """Return the dotted name of the file at *path*, from its outermost package on."""
    stem = path.removesuffix(".py").removesuffix(".pyi")
    folder, _, name = stem.rpartition("/")
    parts = [] if name == "__init__" else [name]
    while folder and folder in packages:
        folder, _, name = folder.rpartition("/")
        parts.append(name)
    return ".".join(reversed(parts)) or name
