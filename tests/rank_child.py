"""Target of a forked test process: a device process's main, over real models, as one of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.heartbeat import HeartbeatPage
from cortex.ipc.ring import TokenRing
from cortex.runtime.device import main as device_main
from cortex.runtime.device import model_runner, sampler
from cortex.runtime.device.row import Row


def run(
    device_name: str,
    address: str,
    ring: TokenRing,
    heartbeat: HeartbeatPage,
    *,
    post: Descriptor,
    memory_bytes: int,
    diverges_after: int | None = None,
    **named: Any,
) -> None:
    """Be *device_name* with one thread; it may choose another token after so many steps."""
    if diverges_after is not None:
        _diverge(diverges_after)
    device_main.main(
        device_name, memory_bytes, 1, address, ring, None, heartbeat, post=post, **named
    )


def _diverge(steps: int) -> None:
    choose, left = sampler.sample, steps

    def wrong(logits: Tensor, rows: Sequence[Row]) -> Any:
        nonlocal left
        chosen, left = choose(logits, rows), left - 1
        if left < 0:
            return [one._replace(token_id=(one.token_id or 0) ^ 1) for one in chosen]
        return chosen

    setattr(model_runner, "sample", wrong)  # noqa: B010 - the one double here
