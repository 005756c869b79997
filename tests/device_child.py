"""Target of a forked test process: a device process's main that loads a fake model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cortex.ipc.heartbeat import HeartbeatPage
from cortex.ipc.ring import TokenRing
from cortex.runtime.device import main as device_main
from engine_fakes import FakeLoad, FakeModel


def run(
    device_name: str,
    address: str,
    ring: TokenRing,
    heartbeat: HeartbeatPage,
    tap_directory: Path | None,
    **named: Any,
) -> None:
    """Run main on *device_name* with 16 MiB and one thread."""
    setattr(device_main, "load_model", FakeLoad(m=FakeModel()))  # noqa: B010 - the one double here
    device_main.main(device_name, 2**24, 1, address, ring, tap_directory, heartbeat, **named)
