"""What the interpreter forgives, the compiler does not: the kernels for GPUs that are not here."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import compiled_triton
from cortex.models.kernels import compiler

SHARED_MEMORY_BYTES = 99 * 1024
"""What a block may have on the RTX 30 and 40 series; data centre GPUs have more."""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_and_fit_a_small_gpu(capability: int) -> None:
    kept = compiler.cache_directory() / "triton"  # by what was compiled: half a minute of a CPU
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        taken = pool.submit(
            compiled_triton.shared_memory_of_launches, capability, str(kept)
        ).result()

    assert set(taken) == {
        *("_attend", "_merge", "_linear"),
        *("_rms_norm", "_silu_multiply", "_add_bias", "_rotate_and_store"),
        *("_convolve", "_keep", "_recurrent", "_solve_chunks", "_pass_chunks"),
        *("_gated_rms_norm", "_sigmoid_multiply"),
        *("_vector", "_tiles", "_add_up", "_unpack", "_route", "_add_choices"),
        *("_gate_up_of_pairs", "_down_of_pairs", "_gate_up_of_tiles", "_down_of_tiles"),
    }
    assert max(taken.values()) <= SHARED_MEMORY_BYTES
