"""``models.toml``: the models that the gateway may load by itself, and other names for models.

A *profile* says how a node is asked to load a model. Its ``id`` is what clients say; ``source`` is
what the node is told where that differs (``file:/srv/models/x.gguf``), and then also the name under
which the node serves it. An *alias* is one more name for a profile, or for whatever a node serves.

The embedded model needs no profile: every neuron knows it by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cortex.ipc.node_api import (
    EMBEDDED_MODEL,
    Limit,
    LoadRequest,
    ReasoningParser,
    SamplingDefaults,
    ToolParser,
    ToolPrompt,
)
from cortex.ipc.settings import Origin, Table, TomlFile

Id = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]
Price = Annotated[float, Meta(ge=0)]

SCHEME = re.compile(r"[a-z][a-z0-9+]*")
DEFAULT_CLASS = 100
"""Of models that say nothing, and of those that are not in the catalogue."""
BOUND_CLASS = 1000


class Limits(Table, frozen=True):
    """``limit`` of a profile, in tokens: shown while no node knows better."""

    context: Count | None = None
    input: Count | None = None
    output: Count | None = None


class Cost(Table, frozen=True):
    """``cost`` of a profile, in US dollars for a million tokens; 0.0 is free, absent not priced."""

    input: Price
    output: Price
    cache_read: Price | None = None
    cache_write: Price | None = None


class Profile(Table, frozen=True):
    """One of ``[[models]]``; what is not said is left to the node.

    A ``source`` that is only a scheme (``huggingface``) stands before the id.
    """

    id: Id
    source: Id | None = None
    harness: Literal["torch", "candle"] = "torch"
    quant: Id | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: Count | None = None
    devices: list[Annotated[int, Meta(ge=0)]] | None = None
    max_context_tokens: Annotated[int, Meta(ge=16)] | None = None
    kv_cache_mb: Count | None = None
    max_sequences: Count | None = None
    sampling: SamplingDefaults | None = None
    tool_prompt: ToolPrompt = "auto"
    tool_parser: ToolParser = "auto"
    reasoning_parser: ReasoningParser = "auto"
    vram_mb: Count | None = None
    """What it needs on all its devices together, before anybody has measured it."""
    min_devices: Count = 1
    """Devices that share it, unless ``tensor_parallel`` says so."""
    min_device_vram_mb: Count | None = None
    """What each of its devices must have in all, free or not."""
    pinned_on: tuple[str, ...] = ()
    """The nodes that may have it; empty: all. It may be evicted there like any other."""
    residency_priority: Annotated[int, Meta(ge=0)] | None = None
    """Its residency class: it may displace models of its own class and of lower ones."""
    preload: bool = False
    """Loaded when the gateway starts, where there is room without evicting anything."""
    idle_unload_seconds: Annotated[float, Meta(ge=0)] | None = None
    """Unloaded after so long without a request; 0: never; None: as ``[eviction]`` says."""
    limit: Limits | None = None
    cost: Cost | None = None
    capabilities: tuple[str, ...] = ()
    """What it can do, shown until a node knows better."""

    @property
    def node_id(self) -> str:
        """The name of the model on a node."""
        if self.source is None:
            return self.id
        return f"{self.source}:{self.id}" if SCHEME.fullmatch(self.source) else self.source

    @property
    def device_count(self) -> int:
        """Devices that share it."""
        return self.tensor_parallel or len(self.devices or ()) or self.min_devices

    @property
    def residency_class(self) -> int:
        """``residency_priority``, or the default: models that are bound to nodes rank higher."""
        if self.residency_priority is not None:
            return self.residency_priority
        return BOUND_CLASS if self.pinned_on else DEFAULT_CLASS

    def known_limit(self) -> Limit | None:
        """Return ``limit`` as nodes spell it."""
        return Limit(**msgspec.structs.asdict(self.limit)) if self.limit else None

    def load_request(self) -> LoadRequest:
        """Return what a node is asked."""
        return LoadRequest(
            model_id=self.node_id,
            harness=self.harness,
            quant=self.quant,
            dtype=self.dtype,
            tensor_parallel=self.device_count if self.device_count > 1 else None,
            devices=self.devices,
            max_context_tokens=self.max_context_tokens,
            kv_cache_mb=self.kv_cache_mb,
            max_sequences=self.max_sequences,
            sampling=self.sampling,
            tool_prompt=self.tool_prompt,
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
        )


class ModelsFile(Table, frozen=True):
    """The whole file."""

    models: tuple[Profile, ...] = ()
    aliases: dict[str, Id] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A model that somebody asked for: its public id, its name on nodes, and how to load it."""

    id: str
    node_id: str
    profile: Profile | None


@dataclass(frozen=True)
class Catalogue:
    """Profiles by id, in the order of the file, and aliases."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def target(self, name: str) -> Target:
        """Return what *name* means; a name that nobody wrote down means itself."""
        public = self.public_id(self.aliases.get(name, name))
        profile = self.profiles.get(public)
        return Target(public, profile.node_id if profile else public, profile)

    def public_id(self, node_id: str) -> str:
        """Return the name that clients use for what nodes call *node_id*."""
        if node_id in self.profiles:
            return node_id
        return self._ids_by_node_id.get(node_id, node_id)

    @cached_property
    def _ids_by_node_id(self) -> dict[str, str]:
        return {profile.node_id: profile.id for profile in self.profiles.values()}

    def with_profile(self, model: str) -> Catalogue:
        """Return this catalogue, with a plain profile for *model* unless it has one."""
        target = self.target(model)
        if target.profile:
            return self
        return Catalogue({**self.profiles, target.id: Profile(target.id)}, self.aliases)


BUILT_IN = Catalogue({EMBEDDED_MODEL: Profile(EMBEDDED_MODEL)})


def load_catalogue(path: Path, neurons: Iterable[str]) -> Catalogue:
    """Return what *path* says about a fleet of *neurons*; raise ConfigError."""
    return _catalogue(TomlFile.read(path), frozenset(neurons))


def _catalogue(file: TomlFile, neurons: frozenset[str]) -> Catalogue:
    said = file.typed(ModelsFile)
    origin = Origin(file)
    origin.refuse_twice(("models",), "id", [profile.id for profile in said.models])
    profiles = dict(BUILT_IN.profiles)
    for index, profile in enumerate(said.models):
        if wrong := _contradiction(profile, profiles, neurons):
            option, words = wrong
            raise origin.wrong(("models", index, option), words)
        profiles[profile.id] = profile
    for alias, target in said.aliases.items():
        if not alias:
            raise origin.wrong(("aliases", alias), "an alias needs a name")
        if alias in profiles:
            raise origin.wrong(("aliases", alias), "this is the id of a model already")
        if target in said.aliases:
            raise origin.wrong(("aliases", alias), f"{target!r} is itself an alias")
    return Catalogue(profiles, said.aliases)


def _contradiction(
    profile: Profile, before: Mapping[str, Profile], neurons: AbstractSet[str]
) -> tuple[str, str] | None:
    """Return the option of *profile* that does not go with the rest, and why; None: all do."""
    for node in profile.pinned_on:
        if node not in neurons:
            return "pinned_on", f"no neuron is called {node!r}"
    others = (other for other in before.values() if other.id != profile.id)
    if same := next((other for other in others if other.node_id == profile.node_id), None):
        at = "source" if profile.source else "id"
        return at, f"to nodes this is {same.id!r}; [aliases] gives a model one more name"
    return _device_contradiction(profile)


def _device_contradiction(profile: Profile) -> tuple[str, str] | None:
    named = profile.devices
    if named is not None and (not named or len(set(named)) < len(named)):
        return "devices", "expected indices of devices, each of them once"
    if named and profile.tensor_parallel not in (None, len(named)):
        return "tensor_parallel", f"devices names {len(named)} of them"
    if profile.min_devices > profile.device_count:
        return "min_devices", f"more than the {profile.device_count} that it is to have"
    return None


def catalogue_for(
    models_config: str | None, config_file: Path | None, neurons: Iterable[str]
) -> Catalogue:
    """Return the catalogue of a configuration: a named file must exist, the default one may."""
    folder = config_file.parent if config_file else Path("/etc/cortex")
    if models_config is not None:
        return load_catalogue(folder / models_config, neurons)
    file = TomlFile.read_if_there(folder / "models.toml")
    return _catalogue(file, frozenset(neurons)) if file else BUILT_IN
