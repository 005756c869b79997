"""Scaled rotary positions against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cortex.models.config_values import rope
from cortex.models.kernels import cpu, reference
from cortex.models.rope import Factors, Linear, Rope, Rotary, Yarn, frequencies

HEAD_DIMS = st.sampled_from([8, 64, 96, 128])
FACTORS = st.floats(1.0, 64.0)
ORIGINALS = st.sampled_from([128, 4096, 8192, 32768])
SCALED = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": FACTORS}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": FACTORS,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(3.0, 8.0),
            "original_max_position_embeddings": ORIGINALS,
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": FACTORS,
            "original_max_position_embeddings": ORIGINALS,
        },
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.sampled_from([8.0, 32.0, 64.0]),
            "beta_slow": st.sampled_from([1.0, 2.0]),
            "mscale": st.floats(0.5, 1.5),
            "mscale_all_dim": st.floats(0.5, 1.5),
            "truncate": st.booleans(),
        },
    ),
)


@given(SCALED, HEAD_DIMS, st.sampled_from([1e4, 5e5, 1e6]))
def test_frequencies_and_magnitude_are_those_of_transformers(
    scaling: dict[str, Any], head_dim: int, theta: float
) -> None:
    parameters = {**scaling, "rope_theta": theta}
    sizes: dict[str, Any] = {
        "hidden_size": head_dim * 2,
        "num_attention_heads": 2,
        "head_dim": head_dim,
    }
    theirs = LlamaConfig(**sizes, max_position_embeddings=65536, rope_parameters=dict(parameters))
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, None)

    found = rope({**sizes, "max_position_embeddings": 65536, "rope_parameters": parameters})

    torch.testing.assert_close(frequencies(found), expected, rtol=1e-5, atol=0)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)


def test_frequencies_without_scaling_are_those_of_the_paper() -> None:
    assert frequencies(Rope(4, 100.0)).tolist() == pytest.approx([1.0, 0.1])


def test_each_pair_may_have_a_factor_of_its_own() -> None:
    assert frequencies(Rope(4, 100.0, Factors((2.0, 5.0)))).tolist() == pytest.approx([0.5, 0.02])


def test_a_position_counts_as_a_part_of_one() -> None:
    slow, plain = Rotary(Rope(8, 1e4, Linear(4.0))), Rotary(Rope(8, 1e4))

    turned = slow(torch.tensor([12]))

    expected = plain(torch.tensor([3]))
    torch.testing.assert_close(turned.cosines, expected.cosines)
    torch.testing.assert_close(turned.sines, expected.sines)


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
def test_rotations_are_as_large_as_their_magnitude(magnitude: float) -> None:
    rotary = Rotary(Rope(8, 1e4, Yarn(4.0, 64, magnitude)))

    cosines, sines = rotary(torch.arange(5))

    torch.testing.assert_close(cosines.square() + sines.square(), torch.full((5, 4), magnitude**2))


def test_the_kernel_agrees_with_the_reference_on_magnitude() -> None:
    kernels = cpu.kernels()
    assert kernels
    positions, slow = torch.arange(40), frequencies(Rope(16, 1e4))

    cosines, sines = kernels.rotation(positions, slow, 1.25)

    expected = reference.rotation(positions, slow, 1.25)
    torch.testing.assert_close(cosines, expected[0])
    torch.testing.assert_close(sines, expected[1])
