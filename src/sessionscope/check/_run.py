"""One run: read, parse, walk, resolve, judge."""

import gc
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from sessionscope.check._config import Config
from sessionscope.check._files import Problem, SourceFile
from sessionscope.check._finding import Report
from sessionscope.check._index import Index, module_name
from sessionscope.check._infer import Inference
from sessionscope.check._model import Model
from sessionscope.check._noqa import Comments
from sessionscope.check._parse import parse, read
from sessionscope.check._registry import RULES
from sessionscope.check._versions import Version
from sessionscope.check._walk import walk


class Project:
    """The files of a run on their way to a model."""

    def __init__(self, config: Config, version: Version | None = None) -> None:
        self._config = config
        self._version = version
        self._index = Index()
        self._comments = Comments()
        self.report = Report()

    def read(self, files: Iterable[SourceFile]) -> None:
        """Read and walk *files*; what cannot be checked is a problem of the report."""
        files = list(files)
        packages = {
            file.path.rpartition("/")[0]
            for file in files
            if f"/{file.path}".endswith("/__init__.py")
        }
        for file in files:
            source = read(file, self.report.problems)
            if source is not None:
                self.add(file.path, source, file.local, packages)

    def add(self, path: str, source: bytes, local: str, packages: set[str]) -> None:
        """Parse and walk one file."""
        tree = parse(source, path, self.report.problems)
        if tree is None:
            return
        try:
            module = walk(tree, path, module_name(path, packages), source)
        except RecursionError:
            self.report.problems.append(Problem(path, 1, "is nested too deeply"))
            return
        self.report.files += 1
        self.report.lines += source.count(b"\n")
        module.local = local
        self._index.add(module)
        self._comments.add(path, source)

    def model(self) -> Model:
        """Return the model of all that was read."""
        config = self._config
        inference = Inference(self._index, config.factories, config.providers)
        return Model(self._index, inference, version=self._version, blocking=config.blocking_calls)

    def judge(self) -> Report:
        """Apply the rules and return the report."""
        config = self._config
        codes = config.codes()
        model = self.model()
        # A comment is in use too where this run would not have shown its finding.
        found = dict.fromkeys(finding for code in codes for finding in RULES[code].judge(model))
        findings = [f for f in self._comments.keep(found) if config.wants(f)]
        if config.reports_unused_noqa():
            findings += self._comments.unused(codes)
        self.report.findings = sorted(findings, key=lambda f: (f.path, f.line, f.column, f.code))
        return self.report


@contextmanager
def quietly() -> Generator[None]:
    """Parse without warnings about other people's code, and collect garbage later.

    Looking for circles among syntax trees, which have none, costs a fifth of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()


def run(files: Iterable[SourceFile], config: Config, version: Version | None = None) -> Report:
    """Check *files* as one project."""
    with quietly():
        project = Project(config, version)
        project.read(files)
        return project.judge()


def run_source(source: str | bytes, path: str, config: Config, version: Version | None) -> Report:
    """Check one file that is not on disk."""
    project = Project(config, version)
    data = source.encode() if isinstance(source, str) else source
    with quietly():
        project.add(path, data, Path(path).name, set())
        return project.judge()
