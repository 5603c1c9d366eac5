"""Work in a forked child, for tests."""

import os
from collections.abc import Callable


def answer_of_a_child(work: Callable[[], object]) -> str:
    """What *work* returns in a forked child, or the error that it raises, in words."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(work()).encode())
        except BaseException as error:  # nothing may leave the child
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said
