"""The background job: the functions of the web side, in units of work of its own.

``python -m shop.worker`` runs one round; ``python -m shop.worker 60`` one every 60 seconds.
"""

import argparse
import time
from collections.abc import Sequence

from sqlalchemy.orm import Session

from . import crud
from .console import number, one_line_errors
from .database import database
from .models import Item, today

REFILL = 10


@database.with_session()
def refill(session: Session) -> Sequence[Item]:
    """Restock what is sold out."""
    return crud.restock_sold_out(session, REFILL)


@database.with_session(read_only=True)
def takings(session: Session) -> int:
    """Return what was sold today, in cents."""
    return crud.revenue(session, today())


def run_once() -> None:
    """Do one round and say what it did. Items stay readable after their session ended."""
    for item in refill():
        print(f"restocked {item.name}: {item.stock}")
    print(f"sold today: {takings() / 100:.2f}", flush=True)


def main() -> None:
    """Run once, or for ever."""
    parser = argparse.ArgumentParser(prog="shop.worker", description=refill.__doc__)
    parser.add_argument("seconds", nargs="?", type=number, help="repeat at this interval")
    seconds = parser.parse_args().seconds
    run_once()
    while seconds is not None:
        time.sleep(seconds)
        run_once()


if __name__ == "__main__":
    with one_line_errors():
        main()
