"""What comes in and what goes out over HTTP."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# What does not fit a column is refused before the database sees it.
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\P{Cc}*$")]


class ItemIn(BaseModel):
    """An item to be added."""

    name: Name


class ItemOut(BaseModel):
    """An item as it is stored."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str
