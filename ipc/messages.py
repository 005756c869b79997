"""The messages exchanged by a neuron's supervisor and its device processes.

``Command`` flows from the supervisor to a device process, ``Event`` flows back. Both are closed
unions of frozen structs told apart by a one-word tag, so the whole conversation can be read on
this page and an unknown message is an error, never a guess. Tokens do not travel here: they, and
the finish of their sequence, are records in the token ring (``cortex.ipc.ring``).

    command         answered by
    Ping            Pong
    LoadModel       LoadProgress..., then ModelLoaded or Failed(command_id)
    UnloadModel     ModelUnloaded or Failed(command_id)
    Generate        records in the ring that end with a finish, or Failed(sequence_id)
    Embed           Embedded or Failed(command_id); Cancel takes its command_id
    Cancel          a CANCELLED finish in the ring; nothing where the sequence has already ended
    QueryMemory     MemoryReport
    ClearPrefixCache  CacheCleared or Failed(command_id)
    JoinGroup       GroupJoined or Failed(command_id)
    CheckCollective CollectiveChecked or Failed(command_id)
    LeaveGroup      GroupLeft
    Shutdown        Bye, then exit 0

The first event of every life is Hello; one whose protocol differs is not talked to. EngineReport
answers nothing: it comes by itself.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PROTOCOL_VERSION = 5
"""Raise it with any change to the fields below; peers that disagree refuse to talk."""


class ReasoningBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a reasoning block may get before ``end_token_ids`` are put in, one a step.

    It begins with ``start_token_ids``, or with the answer where those are empty because the prompt
    has opened it. A block that ends by itself is left alone.
    """

    max_tokens: int
    start_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to choose the next token, already resolved. ``temperature=0`` is greedy.

    ``max_tokens`` counts generated tokens, the end-of-sequence token included; of 0 the prompt is
    computed, and the sequence ends with nothing but its finish. ``top_k=0``,
    ``top_p=1`` and ``min_p=0`` switch those filters off, as 1 does the repetition penalty and 0 the
    other two. ``logit_bias`` is added to the logits of its token ids. ``stop_token_ids`` end the
    sequence. ``top_logprobs`` asks for the log probability of the chosen token and of so many of
    the likeliest ones, None for none at all; they are those of the unmodified distribution.
    ``prompt_logprobs`` asks the same of the prompt's tokens, all of which are then computed.
    ``grammar`` is one that llguidance reads (a Lark text, or its JSON of several grammars): no
    token that it does not allow is chosen, and the answer can end only where it may.
    """

    temperature: float
    max_tokens: int
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    reasoning_budget: ReasoningBudget | None = None
    grammar: str | None = None


class Footprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory that a model holds on one device, in bytes, measured after its load."""

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything the model holds."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


PEER_LOST = "peer_lost"
"""The code of a fatal Failed of a rank whose collective broke: another rank may be at fault."""


class Message(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    """Base of every message; subclasses add a ``tag``."""


# Supervisor -> device process


class Ping(Message, frozen=True, tag="ping"):
    """Are you there? Answered by Pong, between two steps."""

    command_id: int


class LoadModel(Message, frozen=True, tag="load_model"):
    """Map the weights under *path* and allocate the caches; answered by ModelLoaded or Failed.

    *path* is a GGUF file, or a directory with config.json and safetensors. ``dtype`` is ``auto``
    (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. Where the three limits are None
    the device chooses: one full context plus a fair number of short sequences, capped by what is
    free of its memory budget. ``quant`` quantises a dense checkpoint on the way, what came of it is
    kept under ``quant_cache``, where that is given.

    In a ``group`` that it has joined a device loads its rank's part: every rank is sent the same
    command, they agree on the limits, and the rank 0 alone is sent requests.
    """

    command_id: int
    model: str
    path: str
    dtype: str = "auto"
    max_context_tokens: int | None = None
    max_sequences: int | None = None
    kv_cache_bytes: int | None = None
    quant: str | None = None
    quant_cache: str | None = None
    group: str | None = None


class UnloadModel(Message, frozen=True, tag="unload_model"):
    """Give back every byte of *model*; its sequences, if any, end as cancelled first.

    Of a model of a group the rank 0 is sent it first, and the others once that has answered.
    """

    command_id: int
    model: str


class Generate(Message, frozen=True, tag="generate"):
    """Start a sequence; its tokens and its finish come in the ring, a refusal as Failed.

    Of two that wait the one of higher ``priority`` goes first, of equal ones the one that came
    first; for want of memory the last in that order is put back.
    """

    command_id: int
    sequence_id: int
    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0


class Embed(Message, frozen=True, tag="embed"):
    """Compute one vector of the prompt: its last token's, or the mean over all of them."""

    command_id: int
    model: str
    prompt_token_ids: list[int]
    pooling: Literal["last", "mean"]


class Cancel(Message, frozen=True, tag="cancel"):
    """End a sequence within one step; cancelling an unknown one is not an error."""

    command_id: int
    sequence_id: int


class QueryMemory(Message, frozen=True, tag="query_memory"):
    """Ask for a MemoryReport."""

    command_id: int


class ClearPrefixCache(Message, frozen=True, tag="clear_prefix_cache"):
    """Forget all computed prompts of *model* that could be used again; running ones go on."""

    command_id: int
    model: str


class JoinGroup(Message, frozen=True, tag="join_group"):
    """Become *rank* of *ranks* of a tensor-parallel group.

    The ranks meet in the empty directory *meeting*. The descriptors of this rank's end of the plan
    ring (``cortex.ipc.plan_ring``) wait in its post (``cortex.ipc.post``), which says of which
    group they are. Ranks are sent it at the same time: each answers once all have come.
    """

    command_id: int
    group: str
    rank: int
    ranks: int
    meeting: str


class CheckCollective(Message, frozen=True, tag="check_collective"):
    """Sum each rank's number over the group; all ranks are sent it at the same time."""

    command_id: int
    group: str


class LeaveGroup(Message, frozen=True, tag="leave_group"):
    """Forget a group that no model uses any more."""

    command_id: int
    group: str


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Finish the running step, free the device, say Bye and exit 0."""

    command_id: int


Command = (
    Ping
    | LoadModel
    | UnloadModel
    | Generate
    | Embed
    | Cancel
    | QueryMemory
    | ClearPrefixCache
    | JoinGroup
    | CheckCollective
    | LeaveGroup
    | Shutdown
)


# Device process -> supervisor


class Hello(Message, frozen=True, tag="hello"):
    """First event of every device process.

    ``preloaded`` is False where the fork server silently failed to import what it should have;
    ``server_threads`` is the fork server's thread count after its imports and must be 1.
    """

    protocol: int
    device: str
    pid: int
    preloaded: bool
    server_threads: int
    torch_version: str
    cuda_version: str | None = None


class Pong(Message, frozen=True, tag="pong"):
    """Answers Ping."""

    command_id: int


class LoadProgress(Message, frozen=True, tag="load_progress"):
    """How far a load has come, at most ten times a second. ``bytes_total`` 0 means unknown."""

    command_id: int
    model: str
    bytes_done: int
    bytes_total: int


class ModelLoaded(Message, frozen=True, tag="model_loaded"):
    """The model answers from now on. Limits are what the device settled on."""

    command_id: int
    model: str
    footprint: Footprint
    max_context_tokens: int
    max_sequences: int
    kv_cache_tokens: int
    load_seconds: float


class ModelUnloaded(Message, frozen=True, tag="model_unloaded"):
    """Every byte of the model is given back."""

    command_id: int
    model: str


class Embedded(Message, frozen=True, tag="embedded"):
    """The vector of an Embed, float32 in the byte order of the host, of length one (L2)."""

    command_id: int
    vector: bytes


class MemoryReport(Message, frozen=True, tag="memory_report"):
    """Bytes of the device's budget: what there is, and what each model holds."""

    command_id: int
    total_bytes: int
    free_bytes: int
    models: dict[str, Footprint]


class CacheCleared(Message, frozen=True, tag="cache_cleared"):
    """So many blocks of the prefix cache were forgotten."""

    command_id: int
    model: str
    blocks: int


class GroupJoined(Message, frozen=True, tag="group_joined"):
    """All ranks of the group have met; answers JoinGroup. ``backend`` is nccl or gloo."""

    command_id: int
    group: str
    backend: str


class CollectiveChecked(Message, frozen=True, tag="collective_checked"):
    """What the ranks' numbers, which are rank + 1, summed up to here."""

    command_id: int
    group: str
    observed_sum: float


class GroupLeft(Message, frozen=True, tag="group_left"):
    """Answers LeaveGroup."""

    command_id: int
    group: str


class EngineReport(Message, frozen=True, tag="engine_report"):
    """How a model's engine stands: ten times a second while that changes, and when it has no work.

    ``running`` and ``waiting`` are sequences; ``kv_free_tokens`` are positions of the KV cache that
    none of them holds, those that the prefix cache remembers among them. Counted since the load:
    ``preemptions``, and of ``drafted_tokens`` (speculation) those that were right.
    """

    model: str
    running: int
    waiting: int
    kv_free_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int


class Failed(Message, frozen=True, tag="failed"):
    """A command, or a running sequence, could not be carried out. Failure is data.

    ``fatal`` means the device's context is lost: the process exits right after. A Failed that names
    a sequence ends it; whatever the ring still holds of it came before. ``numbers`` are those that
    a load was refused by, in bytes.
    """

    code: str
    detail: str
    command_id: int | None = None
    sequence_id: int | None = None
    fatal: bool = False
    numbers: dict[str, int] = {}


class Bye(Message, frozen=True, tag="bye"):
    """Last event before a clean exit; answers Shutdown."""

    command_id: int


Event = (
    Hello
    | Pong
    | LoadProgress
    | ModelLoaded
    | ModelUnloaded
    | Embedded
    | MemoryReport
    | CacheCleared
    | GroupJoined
    | CollectiveChecked
    | GroupLeft
    | EngineReport
    | Failed
    | Bye
)


def refuse_other_protocol(hello: Hello) -> None:
    """Raise ProtocolError, in words, unless *hello* speaks this version."""
    from cortex.ipc.errors import ProtocolError

    if hello.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the device process of {hello.device} speaks protocol {hello.protocol}, "
            f"this supervisor speaks {PROTOCOL_VERSION}: restart the neuron after an upgrade"
        )
