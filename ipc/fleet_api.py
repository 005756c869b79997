"""The HTTP shapes of ``/fleet``, as the gateway answers them and the command line reads them.

Every member is always there: null is "not known" or "none". Decoders tolerate unknown ones, so that
a gateway and a command of different ages understand each other; megabytes are 2**20 bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.node_api import Activation, DeviceHealth, ModelInfo, ModelLoad, Progress
from cortex.ipc.requests import ModelId

NodeName = Annotated[str, Meta(min_length=1)]

Fits = Literal["now", "after_evicting", "after_waiting", "no", "never", "away"]
"""``away``: the node could hold it, but takes no loads now."""

Source = Literal["measured", "estimate", "profile", "unknown"]
"""Of what a model needs: a load that we saw, its node's arithmetic, ``vram_mb``."""

LoadPhase = Literal["asking", "waiting", "clearing", "loading"]
"""What it needs is found out; others have the memory; they are being unloaded; it fills."""


class FleetDevice(DeviceHealth, frozen=True, kw_only=True):
    """A device as its node's ``/health`` shows it, and what it has in all."""

    vram_total_mb: int | None = None


class FleetModel(ModelInfo, frozen=True, kw_only=True, omit_defaults=False):
    """A model as its node's ``/models`` shows it, under the name that clients say."""

    node_id: str
    """What the node calls it."""
    in_flight: int
    """Requests that run, as the node said last; at an engine those of ours."""
    queue_depth: int
    idle_seconds: float
    """Since its last request; where there was none, since it was seen loaded."""
    unload_in_seconds: float | None
    """When it will be unloaded for being idle, if nobody uses it; None: never."""
    pinned: bool
    residency_class: int
    footprint_mb: int
    """What it holds on all its devices."""


class Drain(msgspec.Struct, frozen=True):
    """How far a node is that operators have drained; over when nothing is left there."""

    done: bool
    in_flight: int
    models: list[str]
    """Not unloaded yet."""


class FleetNode(msgspec.Struct, frozen=True):
    """A node; what it is made of is shown only while it is up."""

    name: str
    endpoint: str
    is_engine: bool
    healthy: bool
    since: float
    """When it went up or down, in seconds since the epoch."""
    failures: int
    """Polls in a row that have failed."""
    error: str | None
    """What was wrong with the last poll."""
    breaker: Literal["closed", "open", "half_open"]
    takes_requests: bool
    why: str | None
    """Why it takes none, in words."""
    draining: bool
    """It finishes what runs: an operator has drained it, or it is about to stop."""
    drain: Drain | None
    """Of an operator's drain."""
    activation: Activation | None
    devices: list[FleetDevice]
    models: list[FleetModel]
    load: list[ModelLoad]


class LoadView(msgspec.Struct, frozen=True):
    """A load that runs, or waits for its turn."""

    model: str
    phase: LoadPhase
    seconds: float
    """Since somebody asked for it."""
    waiting_requests: int
    node: str | None = None
    """None: not placed yet."""
    why: str | None = None
    """What it waits for."""
    progress: Progress | None = None


class FleetView(msgspec.Struct, frozen=True):
    """``GET /fleet``."""

    nodes: list[FleetNode]
    loads: list[LoadView]
    requests_in_flight: int
    """Inside this gateway, waiting ones included."""
    draining: bool
    """This gateway is about to stop."""


class LoadModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/models/load``; without ``node`` placement chooses one."""

    model: ModelId
    node: NodeName | None = None
    wait: bool = False


class LoadAnswer(msgspec.Struct, frozen=True):
    """202 ``loading``, or 200 ``loaded``, and where."""

    status: Literal["loading", "loaded"]
    model: str
    """What the name that was asked for means."""
    node: str | None
    """None: a load that has not been placed yet."""


class UnloadModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/models/unload``; without ``node`` from wherever it is."""

    model: ModelId
    node: NodeName | None = None
    force: bool = False


class UnloadAnswer(msgspec.Struct, frozen=True):
    """It is gone from these nodes."""

    nodes: list[str]
    status: Literal["unloaded"] = "unloaded"


class PinModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/models/pin`` and ``unpin``; without ``node`` wherever it is or may be."""

    model: ModelId
    node: NodeName | None = None


class PinAnswer(msgspec.Struct, frozen=True):
    """On these nodes nobody displaces it; where it is not loaded, that counts once it is."""

    nodes: list[str]
    loaded: bool
    """Whether it is on any of them: a pin loads nothing."""
    status: Literal["pinned"] = "pinned"


class UnpinAnswer(msgspec.Struct, frozen=True):
    """It was pinned on these nodes, and is no longer."""

    nodes: list[str]
    status: Literal["unpinned"] = "unpinned"


class DrainNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /fleet/nodes/{name}/drain`` and ``undrain``: the path says it all."""


class DrainAnswer(msgspec.Struct, frozen=True):
    """Nothing new goes there from now on."""

    node: str
    drain: Drain
    status: Literal["draining", "drained"]


class UndrainAnswer(msgspec.Struct, frozen=True):
    """It takes requests and loads again."""

    node: str
    status: Literal["undrained"] = "undrained"


class CandidateView(msgspec.Struct, frozen=True):
    """One node: its numbers in MB, and what they mean; None is not known."""

    node: str
    fits: Fits
    why: str
    needs_mb: int | None = None
    """What it wants, on all its devices together."""
    source: Source = "unknown"
    """Who says so."""
    free_mb: int | None = None
    reclaimable_mb: int = 0
    """Held by models that could go at once."""
    devices: tuple[int, ...] = ()
    evicts: tuple[str, ...] = ()
    least_mb: int | None = None
    """What it can live with."""
    least_source: Source = "unknown"


class PlacementView(msgspec.Struct, frozen=True):
    """``GET /fleet/placement?model=``; without ``chosen`` there is a ``refusal``.

    That is an error object with its status. Chosen with ``fits`` of ``after_waiting``: what it
    evicts works still, and is waited for.
    """

    model: str
    candidates: list[CandidateView]
    """The best first."""
    needs_mb: int | None = None
    source: Source = "unknown"
    chosen: str | None = None
    fits: Fits = "no"
    devices: tuple[int, ...] = ()
    evicts: tuple[str, ...] = ()
    refusal: dict[str, Any] | None = None
    least_mb: int | None = None
    least_source: Source = "unknown"
    loaded_on: tuple[str, ...] = ()
    """Where it serves already."""


class UsageRow(msgspec.Struct, frozen=True):
    """What one key has used of one model in one day."""

    key: str
    """The key's id; ``-``: those who came without one."""
    model: str
    day: str
    """Of UTC, as YYYY-MM-DD."""
    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    """Those of the prompts that a prefix cache had."""
    completion_tokens: int


class UsageView(msgspec.Struct, frozen=True):
    """``GET /fleet/usage?key=&model=&since=``, by day, key and model."""

    usage: list[UsageRow]
