"""``models.toml``: the models that the gateway may load by itself, and other names for models.

A *profile* says how a node is asked to load a model. Its ``id`` is what clients say; ``source`` is
what the node is told where that differs (``file:/srv/models/x.gguf``), and then also the name under
which the node serves it. An *alias* is one more name for a profile, or for whatever a node serves.

The embedded model needs no profile: every neuron knows it by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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


class Limits(Table, frozen=True):
    """``limit`` of a profile, in tokens: shown while no node knows better."""

    context: Count | None = None
    input: Count | None = None
    output: Count | None = None


class Profile(Table, frozen=True):
    """One of ``[[models]]``; what is not said is left to the node."""

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
    pinned_on: tuple[str, ...] = ()
    limit: Limits | None = None

    @property
    def node_id(self) -> str:
        """The name of the model on a node."""
        return self.source or self.id

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
            tensor_parallel=self.tensor_parallel,
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
        named = (p.id for p in self.profiles.values() if p.source == node_id)
        return next(named, node_id)

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
    profiles = {**BUILT_IN.profiles, **{profile.id: profile for profile in said.models}}
    for index, profile in enumerate(said.models):
        for node in profile.pinned_on:
            if node not in neurons:
                raise origin.wrong(("models", index, "pinned_on"), f"no neuron is called {node!r}")
    for alias, target in said.aliases.items():
        if alias in profiles:
            raise origin.wrong(("aliases", alias), "this is the id of a model already")
        if target in said.aliases:
            raise origin.wrong(("aliases", alias), f"{target!r} is itself an alias")
    return Catalogue(profiles, said.aliases)


def catalogue_for(
    models_config: str | None, config_file: Path | None, neurons: Iterable[str]
) -> Catalogue:
    """Return the catalogue of a configuration: a named file must exist, the default one may."""
    folder = config_file.parent if config_file else Path("/etc/cortex")
    if models_config is not None:
        return load_catalogue(folder / models_config, neurons)
    file = TomlFile.read_if_there(folder / "models.toml")
    return _catalogue(file, frozenset(neurons)) if file else BUILT_IN
