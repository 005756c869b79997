"""Target of a forked test process: a device process's real main, over models that recall.

A model of any name can be loaded; it reports its progress in three parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cortex.runtime.device import main as device_main
from cortex.runtime.device.model_runner import ServableModel
from engine_fakes import FakeModel


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: str,
    on_progress: Callable[[int, int], None],
    **rest: object,
) -> ServableModel:
    """Return a new model."""
    for part in range(3):
        on_progress(part * 500, 1000)
    return FakeModel()


def run(**named: Any) -> None:
    """Be a device process."""
    setattr(device_main, "load_model", load_model)  # noqa: B010 - the one double here
    device_main.main(**named)
