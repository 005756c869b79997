"""What a request may demand of its answer's text; ``cortex.runtime.structured`` enforces it.

OpenAI's ``response_format`` and vLLM's ``structured_outputs`` are two ways to say it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_PATTERN = 16_384
"""Characters of a regular expression."""
MAX_LARK = 65_536
"""Characters of a grammar."""
MAX_CHOICES = 1024
MAX_CHOICE = 4096
"""Characters of one of several texts."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``json_schema`` of a response format; the schema is enforced, ``strict`` or not."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def __post_init__(self) -> None:
        """Refuse a schema that would be ignored, and a type that lacks it."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("Expected `json_schema` with the type 'json_schema', and only there")


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``structured_outputs``, of which one member says what the text must be.

    ``json`` is a JSON schema, or the text of one; ``grammar`` a Lark grammar as llguidance reads
    it.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=MAX_CHOICE)]],
            Meta(min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    grammar: Annotated[str, Meta(min_length=1, max_length=MAX_LARK)] | None = None

    def __post_init__(self) -> None:
        """Refuse several demands at once, and none."""
        if len(self.given) != 1:
            names = ", ".join(self.__struct_fields__)
            raise ValueError(f"Expected one of {names}, not {len(self.given)}")

    @property
    def given(self) -> list[str]:
        """The members that demand something."""
        said = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return [name for name, value in said if value is not None and value is not False]
