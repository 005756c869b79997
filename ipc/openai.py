"""What clients of OpenAI's dialect ask for; ``openai_answers.py`` has what they get.

Requests list every parameter that this version honours, and every one that is known but not
honoured. The latter are accepted at their neutral value only: nothing that is accepted is ignored
(``PARAMETERS``, ``MESSAGE``). A field that is in neither list is refused the same way. Where a
parameter is honoured at some values only, ``refuse_unsupported`` of its request names the others.

Parameters that cannot change the tokens (``user``, ``metadata``, ``store``, ...) are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta

from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.last_turn import EndsInTurn
from cortex.ipc.requests import ModelId, Parameters, decode_object, model_of, typed
from cortex.ipc.structured import ResponseFormat, StructuredOutputs
from cortex.ipc.tools import OffersTools, ToolCall, ToolChoice, Tools

MAX_TOKENS = 2**31 - 1
MAX_CHOICES = 128
MAX_EMBEDDING_INPUTS = 2048

Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0.0, le=1.0)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=2.0)]
"""It divides logits; a smaller one would push them out of what floats hold."""
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
MaxTokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
"""Of 0 the prompt is computed, for the prefix cache say, and the answer is empty."""
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]], Meta(max_length=1024)
]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Prompt = str | list[TokenId | str]
"""Text or token ids; a list with one text is that text."""
Prompts = str | list[TokenId | str | list[TokenId]]
"""One, or several: a list of texts, or of lists of token ids."""

PARAMETERS = Parameters(
    without_effect=frozenset(
        {
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    ),
    neutral={
        "add_generation_prompt": (None, True),
        "audio": (None,),
        "best_of": (None, 1),
        "continue_final_message": (None, False),
        "echo": (None, False),
        "frequency_penalty": (None, 0, 0.0),
        "function_call": (None, "none"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "logprobs": (None, False),
        "min_p": (None, 0, 0.0),
        "min_tokens": (None, 0),
        "modalities": (None, ["text"]),
        "n": (None, 1),
        "parallel_tool_calls": (None, True),
        "prediction": (None,),
        "presence_penalty": (None, 0, 0.0),
        "reasoning": (None, {}, {"summary": "auto"}),
        "reasoning_effort": (None,),
        "repetition_penalty": (None, 1, 1.0),
        "response_format": (None, {"type": "text"}),
        "structured_outputs": (None,),
        "suffix": (None, ""),
        "thinking": (None,),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
        "verbosity": (None,),
        "web_search_options": (None,),
    },
    unknown="unknown parameter: {name!r}",
    unsupported="{name!r} is not supported by this version; leave it out",
)

MESSAGE = Parameters(
    without_effect=frozenset(),
    neutral={"annotations": (None, []), "audio": (None,), "function_call": (None,)},
    unknown="unknown field of a message: {name!r}",
    unsupported="{name!r} is not supported by this version; leave it out of the message",
)
"""What the SDKs put into an answer that comes back as a turn of the conversation."""


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``stream_options`` of a request; obfuscation cannot change the tokens, and adds none here."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One turn; ``content`` is text, a list of parts, or null (a replayed tool turn)."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How Anthropic's and GLM's clients say whether, and how long, a model should think."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None


class ModelRequest(msgspec.Struct, kw_only=True):
    """What every request names."""

    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """What stands here for a parameter that is not honoured."""

    model: ModelId

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for a value that would be ignored."""


class SamplingRequest(ModelRequest, kw_only=True):
    """What chat and text completions share."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    max_tokens: MaxTokens | None = None
    ignore_eos: bool | None = False
    """With a grammar the answer ends nevertheless where nothing can follow."""
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    @property
    def stop_strings(self) -> list[str]:
        """The non-empty stop strings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stop if text]

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream should end with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionRequest(EndsInTurn, OffersTools, SamplingRequest, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: Thinking | None = None
    max_completion_tokens: MaxTokens | None = None
    parallel_tool_calls: bool | None = None
    """False ends an answer where a second call would begin."""
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    @property
    def limit_tokens(self) -> int | None:
        """The newer name wins."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens come with each token; None: no log probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for a value that would be ignored, InvalidRequest for two."""
        super().refuse_unsupported()
        self._refuse_two_formats()
        self.refuse_bad_end(self.messages)
        if self.top_logprobs and not self.logprobs:
            raise UnsupportedParameter(
                "'top_logprobs' needs 'logprobs': true", param="top_logprobs"
            )

    def _refuse_two_formats(self) -> None:
        has_format = self.response_format is not None and self.response_format.type != "text"
        if has_format and self.structured_outputs is not None:
            raise InvalidRequest(
                "'response_format' and 'structured_outputs' both say what the answer must be",
                param="structured_outputs",
            )
        if not self.demands_call:
            return
        for name, is_given in (
            ("response_format", has_format),
            ("structured_outputs", self.structured_outputs is not None),
        ):
            if is_given:
                raise InvalidRequest(
                    f"'tool_choice' demands a call, and {name!r} is about the text: "
                    f"ask for one of them",
                    param=name,
                )


class CompletionRequest(SamplingRequest, kw_only=True):
    """``POST /v1/completions``; a prompt is text or token ids.

    Of several prompts the answers to the first come first, ``n`` to each.
    """

    INSTEAD = {"response_format": "use 'structured_outputs', which says the same here"}

    prompt: Prompts
    suffix: str | None = None
    """What follows the answer, where the model can fill in between."""
    echo: bool | None = False
    """Whether an answer begins with its prompt."""
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        """Refuse lists that mix texts, ids and lists of ids, and more answers than there can be."""
        if not isinstance(self.prompt, str) and len({type(item) for item in self.prompt}) > 1:
            raise ValueError("Expected texts, token ids, or lists of those - at `$.prompt`")
        if self.choices > MAX_CHOICES:
            raise ValueError(
                f"Expected at most {MAX_CHOICES} answers: prompts times n - at `$.prompt`"
            )

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several = [item for item in self.prompt if not isinstance(item, int)]
        return several or [[item for item in self.prompt if isinstance(item, int)]]

    @property
    def choices(self) -> int:
        """How many answers are asked for, to all prompts."""
        return super().choices * len(self.prompts)

    @property
    def limit_tokens(self) -> int | None:
        """What the client asked for; OpenAI's default of 16 is applied by the route."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens come with each token; None: no log probabilities at all."""
        return self.logprobs

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter for a choice among more answers than are shown."""
        if self.best_of not in (None, self.n or 1):
            raise UnsupportedParameter(
                "'best_of' is not supported by this version; leave it out, or ask for as many as "
                "'n'",
                param="best_of",
            )
        if self.suffix and self.echo:
            raise UnsupportedParameter(
                "'echo' is not supported beside 'suffix': the answer stands between the two",
                param="echo",
            )


class TokenizeRequest(EndsInTurn, OffersTools, ModelRequest, kw_only=True):
    """``POST /tokenize``: messages, or a prompt; sampling parameters are not needed."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Prompt | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking: Thinking | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def __post_init__(self) -> None:
        """Refuse both and neither, and prompts that a completion would refuse."""
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("Give messages, or a prompt - at `$.messages`")
        if self.prompt is not None:
            self.prompt = _one_prompt(self.prompt)

    def refuse_unsupported(self) -> None:
        """Raise UnsupportedParameter or InvalidRequest as chat would."""
        super().refuse_unsupported()
        self.refuse_bad_end(self.messages)


class EmbeddingRequest(ModelRequest, kw_only=True):
    """``POST /v1/embeddings``."""

    input: str | list[str | TokenId | list[TokenId]]
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None

    def __post_init__(self) -> None:
        """Refuse no input, too many, and lists that mix texts, ids and lists of ids."""
        if isinstance(self.input, str):
            return
        kinds = {type(item) for item in self.input}
        if not kinds:
            raise ValueError("There must be at least one input - at `$.input`")
        if len(kinds) > 1:
            raise ValueError("Expected texts, token ids, or lists of those - at `$.input`")
        if kinds != {int} and len(self.input) > MAX_EMBEDDING_INPUTS:
            raise ValueError(f"Expected at most {MAX_EMBEDDING_INPUTS} inputs - at `$.input`")

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each a text or the token ids of one."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[item for item in self.input if isinstance(item, int)]]
        return [item for item in self.input if not isinstance(item, int)]


R = TypeVar("R", bound=ModelRequest)


def decode_request(body: bytes, shape: type[R]) -> R:
    """Return the request in *body*.

    Raise MalformedJson, MissingModelField, UnsupportedParameter or InvalidRequest, each naming the
    place.
    """
    raw = decode_object(body)
    model_of(raw)
    honoured = _names(shape)
    PARAMETERS.refuse_unsupported(raw, honoured, instead=shape.INSTEAD)
    for place, message in _messages(raw):
        MESSAGE.refuse_unsupported(message, _names(ChatMessage), place)
    if issubclass(shape, OffersTools):
        shape.refuse_choice(raw.get("tool_choice"))
    request = typed({name: value for name, value in raw.items() if name in honoured}, shape)
    request.refuse_unsupported()
    return request


def _names(shape: type[msgspec.Struct]) -> frozenset[str]:
    return frozenset(shape.__struct_encode_fields__)


def _messages(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the messages that are objects, and their places; the types refuse the others."""
    messages = raw.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        if isinstance(message, dict):
            yield f"messages[{index}]", message


def _one_prompt(prompt: Prompt) -> Prompt:
    """Return *prompt* as text or as a list of ids; raise ValueError for what is neither."""
    if isinstance(prompt, str) or not any(isinstance(item, str) for item in prompt):
        return prompt
    if len(prompt) > 1:
        raise ValueError("Expected one prompt: a text, or a list of token ids - at `$.prompt`")
    return str(prompt[0])
