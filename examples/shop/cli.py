"""The command line: the functions of the web side, one command one unit of work."""

import argparse
from collections.abc import Sequence

from sqlalchemy.orm import Session

from . import crud
from .console import number, one_line_errors
from .database import database


def users(session: Session, _: argparse.Namespace) -> str:
    """List the users."""
    return "\n".join(
        f"{user.id:4}  {user.name} <{user.email}>" for user in crud.list_users(session)
    )


def items(session: Session, _: argparse.Namespace) -> str:
    """List the items with their stock."""
    return "\n".join(
        f"{item.id:4}  {item.name:24} {item.price / 100:8.2f} {item.stock:6} left"
        for item in crud.list_items(session)
    )


def order(session: Session, args: argparse.Namespace) -> str:
    """Order one item."""
    placed = crud.place_order(session, args.user, {args.item: args.quantity})
    return f"order {placed.id}: {placed.total / 100:.2f}"


def restock(session: Session, args: argparse.Namespace) -> str:
    """Put more of an item on the shelf."""
    item = crud.restock(session, args.item, args.quantity)
    return f"{item.name}: {item.stock} left"


def parser() -> argparse.ArgumentParser:
    """Describe the commands: what each reads, and whether it writes."""
    result = argparse.ArgumentParser(prog="shop.cli", description=__doc__)
    commands = result.add_subparsers(metavar="COMMAND", required=True)
    for command, arguments, read_only in [
        (users, (), True),
        (items, (), True),
        (order, ("user", "item", "quantity"), False),
        (restock, ("item", "quantity"), False),
    ]:
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command, read_only=read_only)
        for argument in arguments:
            sub.add_argument(argument, type=number)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; its answer is printed when it is committed."""
    args = parser().parse_args(argv)
    with database.begin(read_only=args.read_only) as session:
        answer = args.command(session, args)
    print(answer)


if __name__ == "__main__":
    with one_line_errors():
        main()
