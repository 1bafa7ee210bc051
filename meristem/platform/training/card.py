"""What a checkpoint's card must hold for others to load its weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

Count = Annotated[int, Field(ge=1, le=1 << 20, strict=True)]


class _Axis(BaseModel):
    name: str
    unit: str


class _Reference(BaseModel):
    size: list[Count]
    sees: list[str]
    embedding: list[float]


class _Options(BaseModel):
    """Of a modality: what the shape of an encoder's input kernel hangs on."""

    patch: list[Count] = []


class _Recipe(BaseModel):
    modality: Annotated[dict[str, _Options], Field(min_length=1, max_length=1)]
    views: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


class _Card(BaseModel):
    """Of a run of one kind of data. channels: of its samples. transfer: what the names of the encoder's weights begin with."""

    kind: str
    step: Annotated[int, Field(ge=0)]
    recipe: _Recipe
    recipe_hash: str
    modality: str
    axes: list[_Axis]
    channels: Count
    transfer: str
    reference: _Reference
    seen: dict[str, Any]

    @model_validator(mode="after")
    def _shown(self) -> Self:
        """The built-in input is as large as samples are shown; else whoever loads the weights embeds what a card asks for."""
        if next(iter(self.recipe.views.values())).get("size") != self.reference.size:
            raise ValueError("reference.size")
        return self


class _Joint(BaseModel):
    """Of a run of several. members: their cards, by name."""

    kind: Literal["joint"]
    step: Annotated[int, Field(ge=0)]
    recipe: dict[str, Any]
    recipe_hash: str
    members: dict[str, dict[str, Any]]
    seen: dict[str, Any]


def wrong(card: dict[str, Any]) -> str:
    """Which entry of a card is missing or not of its type; empty where none is."""
    try:
        (_Joint if card.get("kind") == "joint" else _Card).model_validate(card)
    except ValidationError as error:
        return ".".join(str(part) for part in error.errors()[0]["loc"]) or "reference.size"
    return ""
