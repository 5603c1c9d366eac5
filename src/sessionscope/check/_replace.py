"""Put new text in the place of a file: all of it or nothing."""

import errno
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from sessionscope.check._files import stamp


class Changed(Exception):
    """Somebody else has written the file meanwhile."""


def replace(path: Path, source: bytes, seen: bytes) -> None:
    """Let the file at *path* hold *source*, if its stamp is still *seen*.

    Whatever fails, the file holds the old text or the new one. A link stays a link.
    Raises Changed, or OSError.
    """
    # The rename would put a file in the place of the link.
    target = Path(os.path.realpath(path))
    old = target.stat()
    if not os.access(target, os.W_OK):  # a rename asks the folder alone
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    # In the same folder, because a rename across file systems is a copy.
    with _temporary(target.parent) as new:
        with new.open("wb") as file:
            file.write(source)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError, AttributeError):  # root alone may; Windows has no owners
            os.chown(new, old.st_uid, old.st_gid)
        new.chmod(stat.S_IMODE(old.st_mode))  # after chown, which takes bits away
        if stamp(path) != seen:
            raise Changed
        new.replace(target)


@contextmanager
def _temporary(folder: Path) -> Generator[Path]:
    """Make an empty file in *folder*; it is gone at the end, unless it has another name by then."""
    handle, name = tempfile.mkstemp(prefix=".sessionscope-", dir=folder)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
