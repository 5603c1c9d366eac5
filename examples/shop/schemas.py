"""What comes in and what goes out over HTTP. Prices are in cents."""

from datetime import date
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Larger numbers do not fit the columns; the client hears it before the database does.
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
Quantity = Annotated[int, Field(ge=1, le=1000)]


class Out(BaseModel):
    """An answer, read from the attributes of a mapped object."""

    model_config = ConfigDict(from_attributes=True)


class UserOut(Out):
    """A user as the shop shows them."""

    id: int
    name: str
    email: str


class ItemOut(Out):
    """An item on the shelves."""

    id: int
    name: str
    price: int
    stock: int


class OrderIn(BaseModel):
    """A wish to buy."""

    user_id: Id
    items: dict[Id, Quantity] = Field(
        min_length=1, max_length=100, description="item id: quantity", examples=[{"1": 2}]
    )


class LineOut(Out):
    """One line of an order."""

    item_id: int
    quantity: int
    price: int


class OrderOut(Out):
    """An order that was placed."""

    id: int
    user_id: int
    day: date
    lines: list[LineOut]
    total: int
