"""What a model takes: who is believed, and what a refusal teaches."""

from typing import Any

import pytest

from cortex.gateway.catalogue import Profile
from cortex.gateway.loading import LoadFailed, NodeWentDown, StillBusy, TooSlow, what_now
from cortex.gateway.needs import learnt, need_of
from cortex.gateway.placement import Need
from cortex.ipc.errors import ApiError, LoadedDifferently, NodeTimeout, Recovering, Unloadable
from cortex.ipc.node_api import LoadEstimate

MIB = 2**20


def too_large(weights_mb: int, kv_mb: int) -> Unloadable:
    return Unloadable(
        "too large",
        kind="insufficient_memory",
        weights_bytes=weights_mb * MIB,
        kv_bytes=kv_mb * MIB,
        memory_bytes=1,
    )


@pytest.mark.parametrize(
    ("measured", "estimate", "vram_mb", "need"),
    [
        (70, LoadEstimate(50, 90), 10, Need(70, "measured", 50)),
        (40, LoadEstimate(50, 90), 10, Need(50, "measured", 50)),
        (
            60,
            LoadEstimate(50, 90, is_measured=True),
            10,
            Need(90, "measured", 50, least_source="measured"),
        ),
        (None, LoadEstimate(50, 90), 10, Need(90, "estimate", 50)),
        (None, LoadEstimate(50), 10, Need(50, "estimate", 50)),
        (None, LoadEstimate(), 10, Need(10, "profile")),
        (None, LoadEstimate(), None, Need()),
    ],
)
def test_measurements_come_before_estimates_before_what_is_written(
    measured: int | None, estimate: LoadEstimate, vram_mb: int | None, need: Need
) -> None:
    assert need_of(measured, estimate, Profile("m", vram_mb=vram_mb)) == need


def test_a_refusal_for_want_of_memory_teaches_the_least() -> None:
    assert learnt(Need(), too_large(30, 5)) == Need(35, "estimate", 35)
    assert learnt(Need(90, "estimate", 20), too_large(30, 5)) == Need(90, "estimate", 35)


def test_a_refusal_of_one_of_several_devices_is_multiplied_by_them() -> None:
    error = Unloadable("no", kind="insufficient_memory", weights_bytes=30 * MIB, ranks=4)

    assert learnt(Need(), error) == Need(120, "estimate", 120)


def test_what_was_known_is_not_learnt_again() -> None:
    assert learnt(Need(90, "estimate", 35), too_large(30, 5)) is None


@pytest.mark.parametrize(
    "extras", [{"kind": "quant_not_found"}, {"kind": "insufficient_memory", "weights_bytes": "x"}]
)
def test_other_refusals_teach_nothing(extras: dict[str, Any]) -> None:
    assert learnt(Need(), ApiError("no", extras=extras)) is None


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (too_large(30, 5), Need(35, "estimate", 35)),
        (too_large(1, 0), "elsewhere"),
        (Recovering("a device restarts"), "elsewhere"),
        (NodeWentDown("gone"), "elsewhere"),
        (NodeTimeout("silent"), "elsewhere"),
        (StillBusy("requests run"), "again"),
        (LoadFailed("the disk is full"), "answer"),
        (TooSlow("half an hour"), "answer"),
        (LoadedDifferently("other quant"), "answer"),
        (Unloadable("no such quant", kind="quant_not_found"), "answer"),
    ],
)
def test_what_follows_a_load_that_failed(error: ApiError, step: object) -> None:
    assert what_now(error, Need(10, "profile"), has_room=True) == step


def test_memory_that_is_no_longer_free_is_waited_for() -> None:
    assert what_now(too_large(1, 0), Need(10, "profile"), has_room=False) == "again"
