"""The KV cache is what was asked for, or fair, and never more than what is free."""

from dataclasses import dataclass

import pytest

from cortex.ipc.messages import Footprint, LoadModel
from cortex.runtime.device.memory import DeviceMemory, Needs, refuse_bad_load, settle
from cortex.runtime.device.refusal import Refused

PLENTY = 2**40


@dataclass
class Steps:
    """Memory of a step, to order."""

    fixed_bytes: int = 0
    bytes_per_context_token: int = 0


def needs(context: int = 8192, **steps: int) -> Needs:
    return Needs(
        max_position_embeddings=context,
        kv_bytes_per_token=100,
        block_tokens=16,
        workspace=Steps(**steps),
    )


def load(**limits: int) -> LoadModel:
    return LoadModel(1, "m", "/m", **limits)  # type: ignore[arg-type] # limits are ints


def test_by_default_there_is_one_full_context_and_a_fair_number_of_short_sequences() -> None:
    limits = settle(load(), needs(8192), PLENTY)

    assert (limits.max_context_tokens, limits.max_sequences) == (8192, 32)
    assert limits.blocks * 16 == 8192 + 31 * 512


def test_a_short_context_is_what_a_short_sequence_takes() -> None:
    assert settle(load(), needs(512), PLENTY).blocks * 16 == 32 * 512


def test_more_seats_take_more_short_sequences() -> None:
    limits = settle(load(max_sequences=33), needs(8192), PLENTY)

    assert limits.blocks * 16 == 8192 + 32 * 512


def test_context_and_seats_that_were_asked_for_are_all_full_contexts() -> None:
    limits = settle(load(max_context_tokens=1000, max_sequences=4), needs(), PLENTY)

    assert (limits.max_context_tokens, limits.max_sequences) == (1000, 4)
    assert limits.blocks == 250


def test_the_cache_is_capped_by_what_is_free_beside_the_workspace() -> None:
    limits = settle(load(), needs(1024, fixed_bytes=5000), 5000 + 2000 * 100)

    assert limits.max_context_tokens == 1024
    assert limits.blocks * 16 == 2000


def test_a_context_that_nobody_asked_for_is_shortened_to_what_fits() -> None:
    limits = settle(load(), needs(8192), 1000 * 100)

    assert limits.max_context_tokens == limits.blocks * 16 == 992


def test_workspace_that_grows_with_the_context_is_paid_for() -> None:
    free_bytes = 100_000
    limits = settle(load(), needs(8192, bytes_per_context_token=100), free_bytes)

    assert limits.workspace_bytes == limits.max_context_tokens * 100
    assert limits.workspace_bytes + limits.blocks * 1600 <= free_bytes
    assert limits.max_context_tokens == 496


def test_a_context_that_was_asked_for_and_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(Refused, match=r"4096 tokens .* 0\.4 MiB .* 0\.1 MiB are free") as refused:
        settle(load(max_context_tokens=4096), needs(), 100_000)

    assert refused.value.code == "insufficient_memory"


def test_a_device_without_room_for_256_tokens_refuses() -> None:
    with pytest.raises(Refused, match="one context of 256 tokens"):
        settle(load(), needs(), 255 * 100)


def test_256_tokens_are_enough() -> None:
    assert settle(load(), needs(), 256 * 100).max_context_tokens == 256


def test_a_model_made_for_less_than_256_tokens_needs_no_more() -> None:
    assert settle(load(), needs(64), 64 * 100).max_context_tokens == 64


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(Refused, match="made for 8192") as refused:
        settle(load(max_context_tokens=8193), needs(8192), PLENTY)

    assert refused.value.code == "context_too_long"


def test_a_cache_of_so_many_bytes_is_just_that() -> None:
    limits = settle(load(kv_cache_bytes=100_000), needs(), PLENTY)

    assert limits.blocks == 62
    assert limits.max_context_tokens == 62 * 16


def test_a_context_that_was_asked_for_stays_beside_a_smaller_cache() -> None:
    limits = settle(load(kv_cache_bytes=100_000, max_context_tokens=8192), needs(), PLENTY)

    assert limits.max_context_tokens == 8192


def test_a_cache_too_small_to_be_of_use_is_refused() -> None:
    with pytest.raises(Refused, match="256 are the least") as refused:
        settle(load(kv_cache_bytes=255 * 100), needs(), PLENTY)

    assert refused.value.code == "insufficient_memory"


def test_a_cache_of_more_bytes_than_are_free_is_refused_with_the_numbers() -> None:
    with pytest.raises(Refused, match=r"1\.0 MiB .* do not fit: 0\.5 MiB are free") as refused:
        settle(load(kv_cache_bytes=2**20), needs(), 2**19)

    assert refused.value.code == "insufficient_memory"
    numbers = refused.value.numbers
    assert numbers["kv_bytes"] <= 2**20 < numbers["kv_bytes"] + numbers["workspace_bytes"] + 2**19
    assert numbers["memory_bytes"] == 2**19 + numbers["weights_bytes"]


@pytest.mark.parametrize("limit", ["max_context_tokens", "max_sequences", "kv_cache_bytes"])
def test_a_limit_below_one_is_refused(limit: str) -> None:
    with pytest.raises(Refused, match=f"{limit} is 0"):
        refuse_bad_load(load(**{limit: 0}))


def test_a_dtype_that_is_not_in_the_contract_is_refused() -> None:
    with pytest.raises(Refused, match="'int3' is not one of"):
        refuse_bad_load(LoadModel(1, "m", "/m", dtype="int3"))


def test_what_models_hold_is_not_free() -> None:
    memory = DeviceMemory(1000)
    memory.hold("a", Footprint(100, 200, 50))

    assert memory.free_bytes() == 650
    assert memory.free_bytes(unbooked_bytes=600) == 50
    assert memory.held == {"a": Footprint(100, 200, 50)}


def test_what_a_model_gave_back_is_free() -> None:
    memory = DeviceMemory(1000)
    memory.hold("a", Footprint(100, 200, 50))

    memory.release("a")

    assert memory.free_bytes() == 1000


def test_a_device_that_says_less_is_free_is_believed() -> None:
    assert DeviceMemory(1000, lambda: 400).free_bytes() == 400


def test_a_device_that_says_more_is_free_does_not_raise_the_budget() -> None:
    assert DeviceMemory(1000, lambda: 4000).free_bytes(unbooked_bytes=1) == 999


def test_an_overdrawn_budget_has_nothing_free() -> None:
    assert DeviceMemory(1000).free_bytes(unbooked_bytes=1001) == 0
