"""A recipe's slots: `name: {arguments}` chosen from an explicit table of parts, each with its own typed settings."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from meristem.modalities.base import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)


def _first_field(part: type[Settings]) -> str:
    return next(name for cls in part.__mro__ for name in cls.__annotations__ if name in part.model_fields)


def validated(kind: type[AnySettings], data: Any, *under: str) -> AnySettings:
    """`kind` made of plain data. Raises ValidationError whose places start with `under` and that names near keys."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = []
        for e in error.errors():
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "extra_forbidden":
                near = get_close_matches(str(e["loc"][-1]), _keys(kind, e["loc"][:-1]))
                message = "no such key" + (f"; did you mean {' or '.join(near)}?" if near else "")
            problem = PydanticCustomError("recipe", "{message}", {"message": message})
            details.append(InitErrorDetails(type=problem, loc=(*under, *e["loc"]), input=e["input"]))
        raise ValidationError.from_exception_data(kind.__name__, details) from None


def _keys(kind: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys allowed at a place in a settings model; empty where that cannot be told."""
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, Settings):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field is not None else None
        else:
            kind = get_args(kind)[-1] if get_args(kind) else None  # a mapping's value
        one = [choice for choice in get_args(kind) if choice is not NoneType]
        kind = one[0] if NoneType in get_args(kind) and len(one) == 1 else kind
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Settings) else []


class Slot:
    """Annotation for a field that holds one part of a table.

    Accepts `name`, `{name: {key: value}}`, or `{name: value}` where the value goes to the first field that the part itself
    declares (an inherited one only when it declares none).
    Use as `masking: Annotated[Masking, Slot("masking", MASKINGS)]`.
    """

    def __init__(self, what: str, table: Mapping[str, type[Settings]]) -> None:
        self.what, self.table = what, table

    def parse(self, value: Any) -> Settings:
        if isinstance(value, Settings):
            return value
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError(f"a {self.what} is `name` or `name: {{…}}`, one of {', '.join(self.table)}; got {value!r}")
        (name, arguments), = value.items()
        if name not in self.table:
            near = get_close_matches(str(name), self.table) or list(self.table)
            raise ValueError(f"no {self.what} called '{name}'; did you mean {' or '.join(near)}?")
        part = self.table[name]
        if not isinstance(arguments, Mapping):
            arguments = {} if arguments is None else {_first_field(part): arguments}
        return validated(part, arguments, str(name))

    def dump(self, part: Settings) -> Any:
        name = next(n for n, cls in self.table.items() if cls is type(part))
        return {name: part.model_dump(mode="json")}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(self.dump))
