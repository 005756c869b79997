"""Compiles Triton's kernels for GPUs that are not there, as far as the machine code.

The launches are the real ones; what would run the code is left away. Called in a process of its
own, because Triton knows one driver per process.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch

import delta_cases
from cortex.models.kernels.cuda_attention import Shape, trial_step
from cortex.models.kernels.reference_delta import DeltaHeads
from cortex.models.parallel import Cut
from cortex.models.quantization import ExpertMatrix, Part, row_bytes


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
    _launch_packed()
    _launch_delta()


def _launch_packed() -> None:
    from cortex.models.kernels import triton_experts, triton_quantized

    def zeros(kind: str, rows: int, columns: int) -> Part:
        data = torch.zeros(rows, row_bytes(kind, columns), dtype=torch.uint8)
        return Part(kind, data, is_planar=True)

    for kind, rows in (("Q4_K", 1), ("Q6_K", 100), ("Q8_0", 8), ("Q5_K", 17), ("FP8", 64)):
        x, y = torch.zeros(rows, 4096).bfloat16(), torch.zeros(rows, 256).bfloat16()
        triton_quantized.linear_into(y, x, zeros(kind, 256, 4096))
    triton_quantized.rows(zeros("IQ4_XS", 2, 512), torch.zeros(1, dtype=torch.int64))
    matrices: dict[str, Any] = {}
    for name, (rows, columns) in {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}.items():
        matrices[name] = ExpertMatrix(2, Cut.whole(rows // 2), Cut.whole(columns))
        matrices[name].fill([zeros("Q8_0", rows, columns)])
    for tokens in (1, 80):
        logits, x = torch.zeros(tokens, 2), torch.zeros(tokens, 256).bfloat16()
        ids, weights = triton_experts.route(logits, 2, is_normalised=True)
        triton_experts.experts(x, torch.zeros_like(ids), weights, **matrices)


def _launch_delta() -> None:
    from cortex.models.kernels import triton_convolution, triton_gated_delta, triton_gates

    heads = DeltaHeads(16, 48, 128, 128)
    x = torch.zeros(20, heads.channels, dtype=torch.bfloat16)
    weight, kept = torch.zeros(heads.channels, 4), torch.zeros(8, heads.channels, 3)
    rate, ba = torch.zeros(48), torch.zeros(20, 96, dtype=torch.bfloat16)
    states = torch.zeros(8, 48, 128, 128)
    for lengths in ([(3, 1)] * 4, [(0, 9), (5, 11)]):
        batch = delta_cases.step(lengths)
        tokens = slice(len(batch.positions))
        triton_convolution.causal_convolution(x[tokens], weight, kept, batch)
    batch = delta_cases.step([(0, 9), (5, 11)])
    for rule in (triton_gated_delta.recurrent_delta_rule, triton_gated_delta.chunk_delta_rule):
        rule(x, ba, rate, rate, states=states, heads=heads, batch=batch)
    gate = torch.zeros(2, 256, dtype=torch.bfloat16)
    triton_gates.gated_rms_norm(gate.view(2, 2, 128), gate, torch.zeros(128), 1e-6)
    triton_gates.sigmoid_multiply(gate, gate)
