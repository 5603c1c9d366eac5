"""The tables: users, items with stock, orders and their lines. Prices are in cents."""

from datetime import UTC, date, datetime

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def today() -> date:
    """Return the shop's business day, which is UTC's."""
    return datetime.now(UTC).date()


class Base(DeclarativeBase):
    """What the tables have in common: the MetaData."""


class User(Base):
    """Someone who orders."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(unique=True)


class Item(Base):
    """Something on the shelves. The database itself refuses a negative stock."""

    __tablename__ = "items"
    __table_args__ = (CheckConstraint("stock >= 0", name="stock_not_negative"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    price: Mapped[int]
    stock: Mapped[int]


class Order(Base):
    """What one user bought at once."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id), index=True)
    day: Mapped[date] = mapped_column(default=today, index=True)
    # selectin: whoever reads an order shows its lines, so both come together.
    lines: Mapped[list["OrderLine"]] = relationship(lazy="selectin")

    @property
    def total(self) -> int:
        """The price of all lines together."""
        return sum(line.price * line.quantity for line in self.lines)


class OrderLine(Base):
    """One item of an order, at the price of that day."""

    __tablename__ = "order_lines"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id), primary_key=True)
    quantity: Mapped[int]
    price: Mapped[int]
