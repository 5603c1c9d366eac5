"""What the commands share: how they read numbers, and fail in one line."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError

from sessionscope.exc import SessionScopeError

from .crud import ShopError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user of the shop can meet into one line and exit code 1."""
    try:
        yield
    except (ShopError, SessionScopeError) as error:
        raise stop(error) from None
    except DBAPIError as error:
        reason = str(error.orig).partition("\n")[0]
        raise stop(f"{reason} (no tables yet? python -m shop.demo creates them)") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def stop(reason: object) -> SystemExit:
    """Return the exception that ends a command; drivers like to break their lines."""
    return SystemExit(f"shop: {' '.join(str(reason).split())}")


def number(text: str) -> int:
    """Read a command's argument, a whole number from 1 to a million."""
    if not (text.isdecimal() and 1 <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return int(text)
