"""Compiles Triton's kernels for GPUs that are not there, as far as the machine code.

The launches are the real ones; what would run the code is left away. Called in a process of its
own, because Triton knows one driver per process.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

from cortex.models.kernels.cuda_attention import Shape, trial_step


def shared_memory_of_launches(capability: int, cache: str) -> dict[str, int]:
    """Return the bytes of shared memory that each kernel takes on a GPU of *capability*."""
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
    )
    triton.runtime.driver.set_active(driver)
    taken = dict[str, int]()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert not warmup
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.__name__
        assert compiled.asm["cubin"]
        taken[name] = max(taken.get(name, 0), compiled.metadata.shared)
        return compiled

    JITFunction.run = compile_only
    _launch_all()
    return taken


def _launch_all() -> None:
    from cortex.models.kernels import triton_attention, triton_linear, triton_ops

    shape = Shape(8, 2, 128, 16, torch.bfloat16, "cpu")
    for lengths, batch_invariant in (
        ([(700, 1)], False),
        ([(0, 500)] * 4, False),
        ([(9, 9)], True),
    ):
        q, keys, values, batch = trial_step(shape, lengths)
        triton_attention.attention(q, keys, values, batch, 0.1, batch_invariant=batch_invariant)
    *_, keys, values, _ = trial_step(shape, [(0, 1)])
    x, weight = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(256)
    triton_ops.add_rms_norm(x, x, weight, 1e-5)
    triton_ops.silu_multiply(x)
    triton_ops.add_bias(x, weight)
    turn = torch.zeros(2, 64)
    q, k = torch.zeros(2, 8, 128, dtype=torch.bfloat16), torch.zeros(2, 2, 128).bfloat16()
    slots = torch.zeros(2, dtype=torch.int64)
    triton_ops.rotate_and_store(q, k, k, turn, turn, keys=keys, values=values, slots=slots)
    triton_linear.linear_into(torch.empty_like(x), x, torch.zeros(256, 256, dtype=torch.bfloat16))
