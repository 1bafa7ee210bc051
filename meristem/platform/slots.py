"""A recipe's slots: `name: {arguments}` chosen from an explicit table of parts, each with its own typed settings."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from meristem.modalities.base import Settings


def _first_field(part: type[Settings]) -> str:
    return next(name for cls in part.__mro__ for name in cls.__annotations__ if name in part.model_fields)


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
        return part.model_validate(arguments)

    def dump(self, part: Settings) -> Any:
        name = next(n for n, cls in self.table.items() if cls is type(part))
        return {name: part.model_dump(mode="json")}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse, serialization=core_schema.plain_serializer_function_ser_schema(self.dump))
