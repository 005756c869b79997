"""Which files of a hub's repository a load needs: decided from the listing alone. Pure.

    org/name                 the repository's main branch; huggingface:org/name is the same
    org/name@revision        a branch, a tag or a commit

Without a quant these are the safetensors, whole or sharded, and what describes them; pickled
weights are never fetched, because reading them runs whatever code they hold. With a quant it is the
one GGUF file whose name says so: its tokenizer and template are inside. Where there is none, and
dense weights can become that quant while they are loaded, it is the safetensors again.

    kind                     what is wrong
    source_unsupported       the id names no repository
    quant_not_found          there is no GGUF file of that quant, nor safetensors that could be
                             brought to it; the nearest are named
    quant_ambiguous          there are several, of different models
    quant_required           there are GGUF files only, so one has to be chosen
    split_gguf_unsupported   the GGUF is cut into several files
    weights_unsupported      there are no weights, or only pickled ones
    tokenizer_unsupported    there is no tokenizer.json
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from cortex.ipc.downloads import RepoFile
from cortex.ipc.errors import Unloadable
from cortex.models.checkpoints.shards import INDEX
from cortex.models.checkpoints.tensors import QUANTS
from cortex.runtime.wheel import is_plain

REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9_][\w./+-]{0,199}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
QUANT = re.compile(
    r"[.-]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|FP?16|FP?32))"
    r"(?P<split>-\d{5}-of-\d{5})?\.gguf$",
    re.IGNORECASE,
)

WHOLE = "model.safetensors"
NEEDED = ("config.json", "tokenizer.json")
DESCRIBING = (
    *NEEDED,
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "modules.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Fetched where they are there, beside the weights."""

SHOWN_NEAREST = 3


@dataclass(frozen=True, slots=True)
class HubSource:
    """A revision of a repository."""

    repo: str
    revision: str = "main"

    @property
    def is_commit(self) -> bool:
        """Whether the revision can never name anything else."""
        return COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        """As in an id."""
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit."""

    commit: str
    files: Mapping[str, RepoFile]


def parse_hub(name: str) -> HubSource | None:
    """Return the source that ``org/name[@revision]`` names, None where it names none."""
    repo, at, revision = name.partition("@")
    if not REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        return None
    if at and (not REVISION.fullmatch(revision) or not is_plain(revision)):
        return None
    return HubSource(repo, revision) if at else HubSource(repo)


def gguf_file(source: HubSource, listing: Listing, quant: str) -> RepoFile:
    """Return the GGUF file of *quant*; raise Unloadable, naming the nearest there are."""
    by_quant = _ggufs(listing)
    hits = by_quant.get(_canonical(quant), [])
    if not hits:
        available = [*by_quant, *(QUANTS if _has_safetensors(listing) else ())]
        if not available:
            raise _no_safetensors(source, listing)
        raise quant_not_found(str(source), quant, available)
    if any(_is_split(file.path) for file in hits):
        raise Unloadable(
            f"{source} has {quant} only in several files ({hits[0].path}, ...), and split GGUF "
            "files are not supported: join them with llama-gguf-split --merge and use file:",
            kind="split_gguf_unsupported",
        )
    if len(hits) > 1:
        raise Unloadable(
            f"{source} has {quant} more than once: {', '.join(sorted(f.path for f in hits))}",
            kind="quant_ambiguous",
        )
    return hits[0]


def is_in_situ(listing: Listing, quant: str) -> bool:
    """Whether *quant* is what the safetensors here become while they are loaded."""
    has_file = _canonical(quant) in _ggufs(listing)
    return not has_file and quant.lower() in QUANTS and _has_safetensors(listing)


def dense_weights(source: HubSource, listing: Listing) -> RepoFile:
    """Return the file to begin with: all weights, or their index; raise Unloadable."""
    files = listing.files
    weights = files.get(WHOLE) or files.get(INDEX)
    if weights is None:
        raise _no_safetensors(source, listing)
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise Unloadable(
            f"{source} has no {' and no '.join(missing)}",
            kind="tokenizer_unsupported" if "config.json" in files else "weights_unsupported",
        )
    return weights


def shards(source: str, index: Mapping[str, Any]) -> list[str]:
    """Return the weight files that *index* names; raise Unloadable for what no index says."""
    places = index.get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    if not names or not all(_is_shard(name) for name in names):
        raise Unloadable(
            f"{source}: {INDEX} does not name safetensors files beside it",
            kind="corrupt_checkpoint",
        )
    return sorted(names)


def files_named(source: HubSource, listing: Listing, names: Iterable[str]) -> list[RepoFile]:
    """Return the files of *names*; raise Unloadable where one is not there."""
    missing = sorted(set(names) - set(listing.files))
    if missing:
        raise Unloadable(
            f"{source} lacks files that its index names: {', '.join(missing)}",
            kind="corrupt_checkpoint",
        )
    return [listing.files[name] for name in sorted(names)]


def describing(listing: Listing) -> list[RepoFile]:
    """Return the small files that say what the weights are."""
    return [listing.files[name] for name in DESCRIBING if name in listing.files]


def quants(listing: Listing) -> list[str]:
    """Return the quants that GGUF files here can be asked for by."""
    return sorted(_ggufs(listing))


def quant_of(path: str) -> str | None:
    """Return the quant that the name of a GGUF file states, in upper case."""
    found = QUANT.search(path)
    return _canonical(found[1]) if found else None


def is_model(name: str) -> bool:
    """Whether a GGUF file of this name is a model that can be loaded by its quant."""
    return quant_of(name) is not None and not _is_split(name) and not _is_projector(name)


def quant_not_found(where: str, quant: str, available: Iterable[str]) -> Unloadable:
    """Return the refusal that names what there is, the nearest first."""
    ranked = sorted(available, key=lambda name: (_distance(quant, name), name))
    nearest = ranked[:SHOWN_NEAREST]
    return Unloadable(
        f"{where} has no {quant}; the nearest: {', '.join(nearest)}",
        kind="quant_not_found",
        requested=quant,
        available=sorted(ranked),
        nearest=nearest[0],
    )


def _ggufs(listing: Listing) -> dict[str, list[RepoFile]]:
    found: dict[str, list[RepoFile]] = {}
    for file in listing.files.values():
        name = file.path.rpartition("/")[2]
        if (quant := quant_of(name)) and not _is_projector(name):
            found.setdefault(quant, []).append(file)
    return found


def _is_projector(name: str) -> bool:
    """Whether it is the eyes of a vision model, which lie beside its GGUF files."""
    return name.lower().startswith("mmproj")


def _canonical(quant: str) -> str:
    upper = quant.upper()
    return {"FP16": "F16", "FP32": "F32"}.get(upper, upper)


def _is_split(name: str) -> bool:
    found = QUANT.search(name)
    return found is not None and found["split"] is not None


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and "/" not in name and name.endswith(".safetensors")


def _distance(wanted: str, name: str) -> tuple[float, float]:
    """How far two quants are apart: by bits, then by spelling."""
    alike = SequenceMatcher(None, wanted.upper(), name.upper()).ratio()
    return abs(_bits(wanted) - _bits(name)), 1 - alike


def _bits(quant: str) -> float:
    digits = re.search(r"\d+", quant)
    return float(digits[0]) if digits else 0.0


def _has_safetensors(listing: Listing) -> bool:
    return WHOLE in listing.files or INDEX in listing.files


def _no_safetensors(source: HubSource, listing: Listing) -> Unloadable:
    if available := quants(listing):
        return Unloadable(
            f"{source} has GGUF files only: say which with quant: {', '.join(available)}",
            kind="quant_required",
            available=available,
        )
    pickled = [name for name in listing.files if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
    if pickled:
        why = f"its weights only pickled ({pickled[0]}), and reading those runs the code they hold"
    else:
        why = f"neither {WHOLE} nor GGUF files"
    return Unloadable(
        f"{source} has {why}: a repository with safetensors or GGUF is needed",
        kind="weights_unsupported",
    )
