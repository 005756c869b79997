"""Load checkpoints one after the other in a process of their own, and print what each takes.

    resident_child.py PATH[:QUANT] ...

Of every one a line of JSON: the anonymous resident bytes while it was loaded and after it was
unloaded, beyond those before, and what the model says that its weights take. The first is loaded
once before, so that what a process has once for all (kernels, threads) is not counted.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from cortex.models.loaded_model import LoadedModel
from cortex.models.weights import load_model
from cortex.runtime.device.cuda import reclaim, share_one_heap

CPU = torch.device("cpu")


def anonymous_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")


def load(named: str) -> LoadedModel:
    path, _, quant = named.partition(":")
    return load_model(
        Path(path), device=CPU, dtype="auto", on_progress=lambda *_: None, quant=quant or None
    )


def main(names: list[str]) -> None:
    share_one_heap()
    load(names[0])
    gc.freeze()  # as the device process does: what was imported is not looked through again
    for name in names:
        reclaim(CPU)
        before = anonymous_bytes()
        model = load(name)
        reclaim(CPU)
        loaded, weights = anonymous_bytes() - before, model.weights_bytes
        del model
        reclaim(CPU)
        print(
            json.dumps({"loaded": loaded, "left": anonymous_bytes() - before, "weights": weights})
        )


if __name__ == "__main__":
    main(sys.argv[1:])
