"""The HTTP shapes of a neuron that are not OpenAI's; the gateway's poller reads the same types.

Decoders tolerate unknown fields, so that a gateway and a neuron of different ages understand each
other; megabytes are 2**20 bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.openai import MinP, Penalty, RepetitionPenalty, Temperature, TopK, TopP
from cortex.ipc.requests import ModelId

DeviceState = Literal["starting", "ready", "restarting", "poisoned", "stopped"]

ModelStatus = Literal["loading", "loaded", "recovering", "unloading", "failed"]
"""Public states; ``loading`` covers queued, downloading and loading, told apart by the phase."""

LoadPhase = Literal["queued", "downloading", "loading"]

HEADER_REQUEST_ID = "x-request-id"
HEADER_NODE = "x-cortex-node"
HEADER_REASON = "x-cortex-reason"
HEADER_USAGE = "x-cortex-usage"
HEADER_KEY = "x-cortex-key"
HEADER_PRIORITY = "x-cortex-priority"

NEURON_PORT = 13131
GATEWAY_PORT = 31313
METRICS_PORT = 31314

EMBEDDED_MODEL = "smollm2-135m-instruct"

MAX_BODY_BYTES = 32 * 2**20


class DeviceHealth(msgspec.Struct, frozen=True):
    """One device as ``GET /health`` shows it; None where it cannot be read."""

    index: int
    name: str
    state: DeviceState
    vram_used_mb: int | None = None
    vram_free_mb: int | None = None
    loadable_mb: int | None = None
    """What a load could take: what no model holds, no load on its way, and nobody else."""
    utilization_pct: int | None = None
    temp_c: int | None = None
    lifecycle_cycles: int = 0
    restarts: int = 0
    """Lives of its process that have ended since the neuron started."""
    restarts_by_cause: dict[str, int] = {}
    last_failure: str | None = None
    """Why the last of them ended, in words."""
    foreign_mb: int | None = None
    """Memory that other processes hold of it; None where nobody can say."""


class ActivationFailure(msgspec.Struct, frozen=True):
    """A model of the configuration that could not be loaded at start."""

    model_id: str
    error: str


class Activation(msgspec.Struct, frozen=True):
    """How far the models of the configuration have come."""

    state: Literal["pre_warming", "ready"] = "ready"
    pending: list[str] = []
    in_progress: str | None = None
    completed: list[str] = []
    failed: list[ActivationFailure] = []


class ModelLoad(msgspec.Struct, frozen=True):
    """What a loaded model has to do right now.

    What the prefix cache remembers and nobody uses counts as available.
    """

    id: str
    in_flight: int = 0
    """Seats that are taken: one for each answer that is made."""
    queue_depth: int = 0
    """Requests that wait for seats."""
    max_in_flight: int = 0
    max_queue_depth: int = 0
    kv_budget_mb: int = 0
    kv_available_mb: int = 0
    kv_total_tokens: int = 0
    kv_free_tokens: int = 0
    running: int = 0
    """Sequences that its device computes."""
    waiting: int = 0
    """Sequences that wait there for memory."""
    preemptions: int = 0
    """Sequences that had to give their memory back and were computed again, since the load."""
    drafted_tokens: int = 0
    """Tokens that speculation guessed, since the load."""
    accepted_tokens: int = 0
    """Those of them that were right."""
    tok_s_prefill: float = 0.0
    tok_s_decode: float = 0.0


class Health(msgspec.Struct, frozen=True):
    """``GET /health``."""

    uptime_secs: float
    devices: list[DeviceHealth] = []
    activation: Activation = Activation()
    models: list[ModelLoad] = []
    draining: bool = False


class DeviceInfo(msgspec.Struct, frozen=True):
    """One device as ``GET /discovery`` shows it."""

    index: int
    name: str
    vram_total_mb: int
    compute_capability: str | None = None


class Discovery(msgspec.Struct, frozen=True, omit_defaults=True):
    """``GET /discovery``."""

    hostname: str
    os: str
    kernel: str
    devices: list[DeviceInfo]
    harnesses: list[str]
    cuda_version: str | None = None
    driver_version: str | None = None
    cuda_unavailable_reason: str | None = None


class Version(msgspec.Struct, frozen=True):
    """``GET /version`` of either daemon; None where it does not apply."""

    package_version: str
    git_sha: str
    torch_version: str | None = None
    cuda_version: str | None = None
    nccl_version: str | None = None


class ModelDevice(msgspec.Struct, frozen=True):
    """What a model holds on one device; zeros until it is loaded."""

    index: int
    weights_mb: int = 0
    kv_mb: int = 0
    workspace_mb: int = 0


class Limit(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens; absent is not zero."""

    context: int | None = None
    input: int | None = None
    output: int | None = None


class Servable(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request would meet."""

    ok: bool
    reason: str | None = None
    detail: str | None = None

    @property
    def is_full(self) -> bool:
        """Whether nothing is wrong, and there is no seat now and no place in the queue."""
        return self.reason == "overloaded"


class Progress(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a load has come."""

    phase: LoadPhase
    bytes_done: int = 0
    bytes_total: int = 0
    eta_seconds: float | None = None


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a load cannot work, as a program reads it: the kind, and what the 422 would say beside.

    Bytes of memory are of one device.
    """

    kind: str
    facts: dict[str, Any] = {}


class ModelInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model of ``GET /models``, which is a bare array of these."""

    id: str
    harness: str
    status: ModelStatus
    devices: list[ModelDevice]
    servable: Servable
    capabilities: list[str] = []
    limit: Limit | None = None
    tool_call: bool = False
    reasoning: bool = False
    progress: Progress | None = None
    failure: str | None = None
    refusal: Refusal | None = None
    """What was found out when it was loaded: of a load that the files or the device refused."""


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What holds where a request is silent, as the operator set it; None leaves it to the model."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


ToolPrompt = Literal["auto", "template", "hermes", "refuse"]
"""How tools are told to the model: by its chat template (``auto`` where that can, ``template`` or
the load is refused), as text in the format of the Hermes models, or not at all."""

ToolParser = Literal["auto", "hermes", "qwen_xml", "llama3", "mistral"]
"""The format in which the model writes calls; ``auto`` is that of its chat template."""

ReasoningParser = Literal["auto", "none", "think", "mistral", "reasoning", "thought", "seed"]
"""The marks around the model's reasoning; ``auto`` is those that its chat template writes."""


class LoadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``POST /models/load``.

    ``quant`` absent or null means dense safetensors; else it is that of a GGUF file, or how dense
    weights are quantised while they are loaded. ``devices`` of several share the model
    (``tensor_parallel``, which is their number unless given).
    """

    model_id: ModelId
    harness: Literal["torch", "candle"] = "torch"
    quant: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: Annotated[int, Meta(ge=1)] | None = None
    devices: list[Annotated[int, Meta(ge=0)]] | None = None
    max_context_tokens: Annotated[int, Meta(ge=16)] | None = None
    kv_cache_mb: Annotated[int, Meta(ge=1)] | None = None
    max_sequences: Annotated[int, Meta(ge=1)] | None = None
    sampling: SamplingDefaults | None = None
    tool_prompt: ToolPrompt = "auto"
    tool_parser: ToolParser = "auto"
    reasoning_parser: ReasoningParser = "auto"
    wait: bool = False

    @property
    def ranks(self) -> int:
        """How many devices share the model."""
        return self.tensor_parallel or len(self.devices or ()) or 1


class LoadEstimate(msgspec.Struct, frozen=True, omit_defaults=True):
    """``POST /models/estimate``, with the body of a load: what it would take, without loading.

    Of all its devices together, each of which holds an even share. What cannot work, not even on
    empty devices of this node, is a 422 with its kind, as the load would be; where nobody can tell
    within seconds, or without a download, the numbers are absent.
    """

    least_mb: int | None = None
    """Weights, the smallest useful KV cache and the workspace of a step."""
    wanted_mb: int | None = None
    """What it would hold if there were room for all of it."""
    is_measured: bool = False
    """Whether an earlier load was measured; else it is arithmetic."""


class LoadAnswer(msgspec.Struct, frozen=True):
    """202 ``loading``, or 200 ``loaded``."""

    status: Literal["loading", "loaded"]


class UnloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/unload``."""

    model_id: ModelId
    force: bool = False


class UnloadAnswer(msgspec.Struct, frozen=True):
    """The model is gone, and its memory free."""

    status: Literal["unloaded"] = "unloaded"


class ClearPrefixCacheRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /models/clear_prefix_cache``."""

    model_id: ModelId


class ClearPrefixCacheAnswer(msgspec.Struct, frozen=True):
    """So many blocks of computed prompts were forgotten; what runs goes on."""

    blocks: int
    status: Literal["cleared"] = "cleared"


class RestartRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /devices/{index}/restart``; an empty body means the defaults."""

    force: bool = False


class RestartAnswer(msgspec.Struct, frozen=True):
    """The device is on its way back."""

    status: Literal["restarted"] = "restarted"


class Endpoint(msgspec.Struct, frozen=True):
    """``GET /models/{id}/endpoint``: the base URL, as the caller reached it."""

    url: str


class Capabilities(msgspec.Struct, frozen=True):
    """``GET /models/{id}/capabilities``; an unknown limit is null, absent is not zero."""

    capabilities: list[str]
    limit: Limit | None
    tool_call: bool
    reasoning: bool
    size_bytes: int
    source: Literal["loaded", "cache"]
