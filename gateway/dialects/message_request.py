"""What a request of Anthropic's Messages may say: its shape, and what of it does nothing here.

Nothing that is accepted is ignored, with one list of exceptions: ``WITHOUT_EFFECT`` holds what
Claude Code and the SDKs send and what cannot change a token of the answer. A field that can, and is
not honoured, is refused by its name, and so is a field that nobody has heard of.

    honoured elsewhere       where
    messages, system         message_blocks.py
    tools, tool_choice       message_tools.py
    the rest                 messages.py

``context_management`` may only ask for what is done anyway: to keep all the thinking.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.openai import MAX_TOKENS, ReasoningEffort, TopK, TopP
from cortex.ipc.requests import Parameters, decode_object, model_of, typed

Block = dict[str, Any]
Temperature = Annotated[float, Meta(ge=0.0, le=1.0)]

WITHOUT_EFFECT = frozenset(
    {
        "betas",
        "billing_policy",
        "cache_control",
        "fallback_credit_token",
        "fallbacks",
        "safeguards",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
"""Who pays, how fast, whom to ask when a classifier objects: nothing of it is about the tokens."""
WITHOUT_EFFECT_IN_A_TURN = frozenset(
    {
        "cache_control",
        "container",
        "diagnostics",
        "id",
        "model",
        "stop_details",
        "stop_reason",
        "stop_sequence",
        "type",
        "usage",
    }
)
"""What an answer carries that comes back as a turn."""
KEEP_ALL_THINKING = {"type": "clear_thinking_20251015", "keep": "all"}

PARAMETERS = Parameters(
    without_effect=WITHOUT_EFFECT,
    neutral={
        "compaction": (None,),
        "container": (None,),
        "inference_geo": (None, "global"),
        "mcp_servers": (None, []),
        "thread": (None,),
    },
    unknown="{name}: unknown parameter",
    unsupported="{name}: not supported by this version",
)


class ThinkingConfig(msgspec.Struct, forbid_unknown_fields=True):
    """``thinking``; how it is displayed changes no token of it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    display: str | None = None

    @property
    def is_omitted(self) -> bool:
        """Whether the client wants to know that the model thought, and not what."""
        return self.display == "omitted"


class JsonFormat(msgspec.Struct, forbid_unknown_fields=True):
    """What the text of the answer must be."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class TurnOutput(msgspec.Struct, forbid_unknown_fields=True):
    """``output_config`` of one turn, from which on it holds."""

    effort: ReasoningEffort | None = None


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """``output_config`` of the request; only the absence of a task budget is honoured."""

    effort: ReasoningEffort | None = None
    format: JsonFormat | None = None
    task_budget: None = None


class Turn(msgspec.Struct):
    """One message; Claude Code sends system turns among the others."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block] | UnsetType = UNSET
    output_config: TurnOutput | None = None
    clear_at: Literal["next_user_message", "never"] | None = None

    @property
    def blocks(self) -> list[Block]:
        """The content as blocks."""
        if isinstance(self.content, str):
            return [{"type": "text", "text": self.content}]
        return [] if self.content is UNSET else self.content


class Metadata(msgspec.Struct):
    """``metadata``, for the session in it."""

    user_id: str | None = None


class Diagnostics(msgspec.Struct):
    """``diagnostics``: why the last prompt was not found in the cache, which nobody knows here."""

    previous_message_id: str | None = None


class MessagesRequest(msgspec.Struct):
    """What is honoured of a request; ``counts_only`` ones have no limit."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    system: str | list[Block] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    tools: list[Block] | None = None
    tool_choice: Block | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    """The older place of ``output_config.format``."""
    metadata: Metadata | None = None
    diagnostics: Diagnostics | None = None

    @property
    def effort(self) -> ReasoningEffort | None:
        """How much the model should think: as the last turn says that says it."""
        said = [self.output_config, *(turn.output_config for turn in self.messages)]
        efforts = [output.effort for output in said if output and output.effort]
        return efforts[-1] if efforts else None

    @property
    def format(self) -> JsonFormat | None:
        """What the text of the answer must be; None: anything."""
        return self.output_config.format if self.output_config else None

    @property
    def diagnosed(self) -> dict[str, Any] | None:
        """Return ``diagnostics`` of the answer."""
        if self.diagnostics is None or self.diagnostics.previous_message_id is None:
            return None
        return {"cache_miss_reason": {"type": "unavailable"}}


HONOURED = frozenset(MessagesRequest.__struct_fields__) | {"context_management"}
HONOURED_IN_A_TURN = frozenset(Turn.__struct_fields__) | WITHOUT_EFFECT_IN_A_TURN


def decode_request(body: bytes, *, counts_only: bool) -> MessagesRequest:
    """Return the request in *body*; raise the ApiError that names what is wrong with it."""
    raw = decode_object(body)
    model_of(raw)
    PARAMETERS.refuse_unsupported(raw, HONOURED)
    _refuse_edits(raw.get("context_management"))
    _refuse_fields_of_turns(raw.get("messages"))
    request = typed(raw, MessagesRequest)
    for position, turn in enumerate(request.messages):
        if turn.content is UNSET and turn.role != "system":
            place = f"messages.{position}.content"
            raise InvalidRequest(f"{place}: field required", param=place)
    if request.max_tokens is None and not counts_only:
        raise InvalidRequest("max_tokens: field required", param="max_tokens")
    if request.output_format is not None:
        _move_format(request)
    return request


def unsupported(place: str) -> UnsupportedParameter:
    """Return the refusal of what stands at *place*."""
    return UnsupportedParameter(PARAMETERS.unsupported.format(name=place), param=place)


def _move_format(request: MessagesRequest) -> None:
    """Put the format where it stands today; raise InvalidRequest where one stands there."""
    request.output_config = request.output_config or OutputConfig()
    if request.output_config.format is not None:
        raise InvalidRequest(
            "output_format: output_config.format says it too; leave one out", param="output_format"
        )
    request.output_config.format = request.output_format


def _refuse_edits(management: Any) -> None:
    edits = management.get("edits") if isinstance(management, dict) else None
    for position, edit in enumerate(edits if isinstance(edits, list) else []):
        if edit != KEEP_ALL_THINKING:
            raise unsupported(f"context_management.edits.{position}")


def _refuse_fields_of_turns(turns: Any) -> None:
    for position, turn in enumerate(turns if isinstance(turns, list) else []):
        for name in turn if isinstance(turn, dict) else ():  # what is none, the types refuse
            if name not in HONOURED_IN_A_TURN:
                raise unsupported(f"messages.{position}.{name}")
