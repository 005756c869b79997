"""The faults of ``cortex.ipc.injection`` that happen inside a device process.

``arm`` puts them around what the process is made of, when it is made; where no fault was ordered
nothing of this is there, and a step costs what it costs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from cortex.ipc.channel import DeviceEnd
from cortex.ipc.injection import GARBAGE, Passes, parse
from cortex.ipc.messages import Command, Event
from cortex.models.batch import Batch, KVCache
from cortex.runtime.device import sampler
from cortex.runtime.device.loader import LoadFunction
from cortex.runtime.device.model_runner import Module, ServableModel

P = ParamSpec("P")
T = TypeVar("T")

MORE_THAN_THERE_IS_BYTES = 2**56
HANGS_SECONDS = 3600.0


def arm(
    faults: str, channel: DeviceEnd, load_model: LoadFunction
) -> tuple[DeviceEnd | FaultyChannel, LoadFunction]:
    """Return *channel* and *load_model* with *faults* in them; sampling gets its own in place."""
    ordered = parse(faults)
    if sampling := Passes(ordered, "sample"):
        vars(sampler)["choose"] = _before(sampler.choose, sampling)  # of this process alone
    loading, stepping = Passes(ordered, "load"), Passes(ordered, "forward")
    events = Passes(ordered, "event")
    return (
        FaultyChannel(channel, events) if events else channel,
        FaultyLoad(load_model, loading, stepping) if loading or stepping else load_model,
    )


def strike(kind: str) -> None:
    """Let a fault of *kind* happen; ``nan`` and ``garbage`` are their boundaries' own."""
    match kind:
        case "oom":
            torch.empty(MORE_THAN_THERE_IS_BYTES, dtype=torch.uint8)
        case "error":
            raise RuntimeError("an injected error")
        case "lost":
            raise RuntimeError("CUDA error: an injected illegal memory access")
        case "hang":
            time.sleep(HANGS_SECONDS)
        case "abort":
            os.abort()
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case _:
            pass


class FaultyChannel:
    """A channel that sends garbage before an event."""

    def __init__(self, channel: DeviceEnd, passes: Passes) -> None:
        self._channel = channel
        self._passes = passes

    def send(self, event: Event) -> None:
        """Send *event*."""
        if self._passes.strikes():
            self._channel.send_frame(GARBAGE)
        self._channel.send(event)

    def receive_waiting(self) -> Command | None:
        """Return the next command that has arrived, or None; raise ProtocolError."""
        return self._channel.receive_waiting()

    def wait(self, timeout_seconds: float | None, *also: int) -> None:
        """Return when a command has arrived, a descriptor is readable, or in time."""
        self._channel.wait(timeout_seconds, *also)


class FaultyLoad:
    """A ``load_model`` that goes wrong half-way, or whose models do in a step."""

    def __init__(self, load_model: LoadFunction, loading: Passes, stepping: Passes) -> None:
        self._load_model = load_model
        self._loading = loading
        self._stepping = stepping

    def __call__(
        self,
        path: Path,
        *,
        device: torch.device,
        dtype: str,
        on_progress: Callable[[int, int], None],
        **rest: Any,
    ) -> ServableModel:
        """Read the weights at *path*."""
        due = self._loading.strikes()

        def half_way(bytes_done: int, bytes_total: int) -> None:
            nonlocal due
            on_progress(bytes_done, bytes_total)
            if due is not None and bytes_done * 2 >= bytes_total:
                kind, due = due, None
                strike(kind)

        model = self._load_model(path, device=device, dtype=dtype, on_progress=half_way, **rest)
        return _FaultyModel(model, self._stepping) if self._stepping else model


class _FaultyModel:
    """A model whose forward goes wrong; everything else is the model's own."""

    def __init__(self, model: ServableModel, passes: Passes) -> None:
        self._model = model
        self.module = _FaultyModule(model.module, passes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def recorded(self, cache: KVCache, max_sequences: int) -> Callable[[Batch], Tensor]:
        """Return the model's own, gone wrong likewise."""
        return partial(self.module.passed, self._model.recorded(cache, max_sequences))


class _FaultyModule:
    """A module either of whose passes goes wrong; the loader's measuring steps are none."""

    def __init__(self, module: Module, passes: Passes) -> None:
        self._module = module
        self._passes = passes

    def __call__(self, batch: Batch) -> Tensor:
        """Batch -> logits."""
        return self.passed(self._module, batch)

    def hidden(self, batch: Batch) -> Tensor:
        """Batch -> hidden states."""
        return self.passed(self._module.hidden, batch)

    def passed(self, compute: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Compute, unless a fault is due."""
        if threading.current_thread() is not threading.main_thread():
            return compute(batch)
        kind = self._passes.strikes()
        if kind is not None:
            strike(kind)
        rows = compute(batch)
        if kind == "nan":
            rows = rows.clone()
            rows[0] = torch.nan
        return rows


def _before(function: Callable[P, T], passes: Passes) -> Callable[P, T]:
    @wraps(function)
    def struck(*args: P.args, **kwargs: P.kwargs) -> T:
        if (kind := passes.strikes()) is not None:
            strike(kind)
        return function(*args, **kwargs)

    return struck
