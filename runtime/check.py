"""``neuron check``: what a load would take and where it would fit, without loading anything.

What is needed is ``estimates.py``'s arithmetic; here it is judged by what is free. For a model on
one device every device is a row, for one that several share every rank of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cortex.ipc.errors import Unloadable
from cortex.ipc.node_api import LoadRequest
from cortex.models.checkpoints.checkpoint import Checkpoint
from cortex.runtime import preflight
from cortex.runtime.config import DeviceSpec
from cortex.runtime.device_choice import choose_devices
from cortex.runtime.discovery import GpuProbe, Inventory, ProbeFailed
from cortex.runtime.estimates import workspace_bytes
from cortex.runtime.model_files import ModelFiles, Survey
from cortex.runtime.places import Places
from cortex.runtime.preflight import Needs

MIB = 2**20
BFLOAT16_SINCE = 8
"""The major number of the first compute capability that has it."""


EMULATED = "; it has no bfloat16, which is slow there: load it with dtype float16"


@dataclass(frozen=True, slots=True)
class Room:
    """A device of this host, and what is free of it now."""

    spec: DeviceSpec
    free_bytes: int
    compute_capability: str | None = None
    is_ready: bool = True
    is_poisoned: bool = False
    failure: str | None = None

    @property
    def emulates_bfloat16(self) -> bool:
        """Whether it is a GPU that has no arithmetic of that width (before Ampere)."""
        capability = self.compute_capability
        return capability is not None and int(capability.partition(".")[0]) < BFLOAT16_SINCE


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device, judged; numbers of the model are None where only a download tells them."""

    device: str
    rank: int
    fits: bool
    words: str
    total_bytes: int
    free_bytes: int
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    kv_bytes: int | None = None
    """Of one full context."""
    state_bytes: int | None = None
    """Of the recurrent states of one sequence; None where the model has none."""
    workspace_bytes: int | None = None
    """Estimated."""
    context_tokens: int | None = None
    """How long a context has room."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``neuron check --json`` prints."""

    model: str
    loadable: bool
    refusal: dict[str, Any] | None = None
    """Why no device could serve it: message, kind and numbers."""
    origin: str | None = None
    cached: bool = False
    size_bytes: int | None = None
    download_bytes: int | None = None
    architecture: str | None = None
    quant: str | None = None
    """None: dense."""
    becomes: str | None = None
    """What dense weights are quantised to while they are loaded."""
    tensor_parallel: int = 1
    quants: Sequence[str] = ()
    context_tokens: int | None = None
    devices: Sequence[Verdict] = ()


def check(request: LoadRequest, places: Places, rooms: Sequence[Room]) -> Answer:
    """Return what a load of *request* on one of *rooms* would take."""
    files = ModelFiles(places)
    try:
        files.refuse(request)
        survey = asyncio.run(files.survey(request))
    except Unloadable as exc:
        return Answer(request.model_id, loadable=False, refusal=_refusal(exc))
    finally:
        files.close()
    return judge(request, survey, rooms)


def judge(request: LoadRequest, survey: Survey, rooms: Sequence[Room]) -> Answer:
    """Return the answer to what was found."""
    download = None if survey.size_bytes is None else survey.size_bytes - survey.bytes_here
    answer = Answer(
        request.model_id,
        loadable=False,
        origin=survey.origin,
        cached=survey.path is not None,
        size_bytes=survey.size_bytes,
        download_bytes=download,
        quants=survey.quants,
        tensor_parallel=request.ranks,
    )
    checkpoint, ranks = survey.checkpoint, request.ranks
    try:
        rooms = _chosen(request, rooms)
    except Unloadable as exc:
        return _with(answer, refusal=_refusal(exc))
    if checkpoint is None:
        share = None if survey.size_bytes is None else survey.size_bytes // ranks
        verdicts = [_by_size(rank, room, share) for rank, room in _ranked(rooms, ranks)]
        return _with(answer, devices=verdicts, loadable=_is_loadable(verdicts, ranks))
    answer = _with(
        answer,
        architecture=checkpoint.config.get("model_type"),
        quant=checkpoint.quant,
    )
    try:
        verdicts = [
            _by_headers(rank, room, request, checkpoint) for rank, room in _ranked(rooms, ranks)
        ]
        needs = preflight.needs(checkpoint, request)
        becomes = preflight.in_situ(checkpoint, request.quant)
    except Unloadable as exc:
        return _with(answer, refusal=_refusal(exc))
    return _with(
        answer,
        becomes=becomes,
        context_tokens=needs.context_tokens,
        devices=verdicts,
        loadable=_is_loadable(verdicts, ranks),
    )


def _chosen(request: LoadRequest, rooms: Sequence[Room]) -> Sequence[Room]:
    """Return the devices to judge: those asked for, the ranks of a group, or all; Unloadable."""
    if request.ranks == 1 and request.devices is None:
        return rooms
    return choose_devices(request, rooms, lambda room: room.free_bytes)


def _ranked(rooms: Sequence[Room], ranks: int) -> Sequence[tuple[int, Room]]:
    return [(rank if ranks > 1 else 0, room) for rank, room in enumerate(rooms)]


def _is_loadable(verdicts: Sequence[Verdict], ranks: int) -> bool:
    fits = [verdict.fits for verdict in verdicts]
    return all(fits) if ranks > 1 else any(fits)


def rooms_of(specs: Sequence[DeviceSpec], inventory: Inventory, probe: GpuProbe) -> list[Room]:
    """Return the devices with what is free of them; who uses it does not matter."""
    by_name = {f"cuda:{gpu.index}": gpu for gpu in inventory.gpus}
    found: list[Room] = []
    for spec in specs:
        free: int | None = None
        if spec.name in by_name:
            with contextlib.suppress(ProbeFailed):
                free = probe.read(by_name[spec.name]).free_bytes
        bound = spec.memory_bytes if free is None else min(free, spec.memory_bytes)
        gpu = by_name.get(spec.name)
        found.append(Room(spec, bound, gpu.compute_capability if gpu else None))
    return found


def show(console: Console, answer: Answer) -> None:
    """Print *answer* for people."""
    facts = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2))
    for name, value in _facts(answer):
        facts.add_row(name, Text(value))
    console.print(facts)
    if answer.refusal is not None:
        console.print(Text(f"not loadable: {answer.refusal['message']}"))
        return
    console.print()
    console.print(_table(answer.devices))
    if answer.devices and any(verdict.workspace_bytes for verdict in answer.devices):
        console.print(
            "In MB of 2^20 bytes, of each device; KV of one full context, workspace estimated."
        )


def _by_headers(rank: int, room: Room, request: LoadRequest, checkpoint: Checkpoint) -> Verdict:
    kind = room.spec.kind
    is_cpu = kind == "cpu"
    auto_bytes = preflight.auto_dtype_bytes(checkpoint, is_cpu=is_cpu)
    needs = preflight.needs(checkpoint, request, auto_bytes)
    width_bytes = preflight.DTYPE_BYTES.get(request.dtype, auto_bytes)
    workspace = workspace_bytes(checkpoint.config, kind, width_bytes, request.ranks)
    states = needs.context_kv_bytes - needs.context_tokens * needs.kv_bytes_per_token
    left = room.free_bytes - needs.weights_bytes - workspace - states
    context = max(0, min(needs.context_tokens, left // needs.kv_bytes_per_token))
    least = needs.least_bytes + workspace
    slow = room.emulates_bfloat16 and request.dtype in {"auto", "bfloat16"} and width_bytes == 2
    return Verdict(
        room.spec.name,
        rank,
        fits=least <= room.free_bytes,
        words=_words(room, needs, least, context) + (EMULATED if slow else ""),
        total_bytes=room.spec.memory_bytes,
        free_bytes=room.free_bytes,
        weights_bytes=needs.weights_bytes,
        kv_bytes_per_token=needs.kv_bytes_per_token,
        kv_bytes=needs.context_kv_bytes,
        state_bytes=needs.state_bytes or None,
        workspace_bytes=workspace,
        context_tokens=context,
    )


def _words(room: Room, needs: Needs, least: int, context: int) -> str:
    if least <= room.free_bytes:
        is_all = context == needs.context_tokens
        return "fits" if is_all else f"fits, with {context} of {needs.context_tokens} tokens"
    if least <= room.spec.memory_bytes:
        return f"would fit if it were empty: needs {_mb(least)} MB"
    return f"too small: needs {_mb(least)} MB"


def _by_size(rank: int, room: Room, size_bytes: int | None) -> Verdict:
    """Judge by the size of the files alone."""
    fits = size_bytes is None or size_bytes <= room.free_bytes
    if size_bytes is None:
        words = "nobody knows its size before it is downloaded"
    else:
        words = "has room for its weights" if fits else f"too small: needs {_mb(size_bytes)} MB"
    return Verdict(
        room.spec.name,
        rank,
        fits,
        words,
        room.spec.memory_bytes,
        room.free_bytes,
        weights_bytes=size_bytes,
    )


def _facts(answer: Answer) -> list[tuple[str, str]]:
    facts = [("model", answer.model)]
    if answer.origin is not None:
        facts += [("from", answer.origin), ("download", _download(answer))]
    if answer.architecture is not None:
        facts += [
            ("architecture", answer.architecture),
            ("weights", _weights(answer)),
        ]
    if answer.tensor_parallel > 1:
        facts.append(("shared by", f"{answer.tensor_parallel} devices"))
    if answer.quants:
        facts.append(("quants there", ", ".join(answer.quants)))
    if answer.context_tokens is not None:
        facts.append(("context", f"{answer.context_tokens} tokens"))
    return facts


def _weights(answer: Answer) -> str:
    if answer.quant:
        return f"GGUF, mostly {answer.quant}"
    return f"dense, quantised to {answer.becomes} while loading" if answer.becomes else "dense"


def _download(answer: Answer) -> str:
    if answer.cached:
        return "none: all of it is here"
    if answer.size_bytes is None or answer.download_bytes is None:
        return "of a size that the package index does not say"
    here = answer.size_bytes - answer.download_bytes
    had = f", {_mb(here)} MB of it are here" if here else ""
    return f"{_mb(answer.download_bytes)} MB{had}"


def _table(verdicts: Sequence[Verdict]) -> Table:
    has_states = any(verdict.state_bytes for verdict in verdicts)
    are_ranks = any(verdict.rank for verdict in verdicts)
    states = ("state",) if has_states else ()
    numbers = ("total", "free", "weights", "KV/token", "KV", *states, "workspace")
    columns = [Column(name, justify="right") for name in numbers]
    ranks = [Column("rank", justify="right")] if are_ranks else []
    table = Table(*ranks, Column("device"), *columns, Column("verdict", overflow="fold"))
    for verdict in verdicts:
        per_token = verdict.kv_bytes_per_token
        table.add_row(
            *([str(verdict.rank)] if are_ranks else []),
            verdict.device,
            f"{verdict.total_bytes // MIB}",
            f"{verdict.free_bytes // MIB}",
            _shown(verdict.weights_bytes),
            "" if per_token is None else f"{per_token / MIB:.3f}",
            _shown(verdict.kv_bytes),
            *([_shown(verdict.state_bytes)] if has_states else []),
            _shown(verdict.workspace_bytes),
            verdict.words,
        )
    return table


def _shown(count: int | None) -> str:
    return "" if count is None else str(_mb(count))


def _mb(count: int) -> int:
    """Whole megabytes, rounded up: what is needed must not look smaller than it is."""
    return -(-count // MIB)


def _refusal(exc: Unloadable) -> dict[str, Any]:
    return {"message": str(exc), **exc.extras}


def _with(answer: Answer, **changes: Any) -> Answer:
    changed: Answer = msgspec.structs.replace(answer, **changes)
    return changed
