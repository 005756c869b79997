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

from cortex.gateway.config import ConfigError, Part, read_toml, typed
from cortex.ipc.node_api import EMBEDDED_MODEL, Limit, LoadRequest
from cortex.ipc.openai import Temperature, TopK, TopP

Id = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1)]


class Limits(Part, frozen=True):
    """``limit`` of a profile, in tokens: shown while no node knows better."""

    context: Count | None = None
    input: Count | None = None
    output: Count | None = None


class SamplingDefaults(Part, frozen=True, omit_defaults=True):
    """``sampling`` of a profile: what holds where a request is silent."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None


class Profile(Part, frozen=True):
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
        sampling = msgspec.to_builtins(self.sampling) if self.sampling else None
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
            sampling=sampling,
        )


class ModelsFile(Part, frozen=True):
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
    text, raw = read_toml(path)
    file = typed(raw, ModelsFile, path, text)
    ids = [profile.id for profile in file.models]
    names = set(neurons)
    for profile in file.models:
        if ids.count(profile.id) > 1:
            raise ConfigError(f"{path}: models: id {profile.id!r} is there twice")
        for node in profile.pinned_on:
            if node not in names:
                raise ConfigError(f"{path}: {profile.id}: pinned_on: no neuron is called {node!r}")
    for alias, target in file.aliases.items():
        if alias in ids or alias in BUILT_IN.profiles:
            raise ConfigError(f"{path}: aliases: {alias!r} is the id of a model already")
        if target in file.aliases:
            raise ConfigError(f"{path}: aliases: {alias!r} names {target!r}, itself an alias")
    profiles = {**BUILT_IN.profiles, **{profile.id: profile for profile in file.models}}
    return Catalogue(profiles, file.aliases)


def catalogue_for(
    models_config: str | None, config_file: Path | None, neurons: Iterable[str]
) -> Catalogue:
    """Return the catalogue of a configuration: a named file must exist, the default one may."""
    folder = config_file.parent if config_file else Path("/etc/cortex")
    if models_config is not None:
        return load_catalogue(folder / models_config, neurons)
    default = folder / "models.toml"
    return load_catalogue(default, neurons) if default.exists() else BUILT_IN
