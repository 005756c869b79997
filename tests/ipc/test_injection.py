"""How faults are spelled, and when they strike."""

import pytest

from cortex.ipc.injection import KINDS, Fault, Passes, of_life, parse, spelled


def test_faults_are_spelled_with_place_pass_and_lives() -> None:
    assert parse("cpu:0/forward:hang@3x4, sample:oom") == [
        Fault("forward", "hang", 3, 4, "cpu:0"),
        Fault("sample", "oom"),
    ]


def test_no_faults_are_none() -> None:
    assert parse(" ") == []


@pytest.mark.parametrize("boundary", sorted(KINDS))
def test_every_kind_is_read_as_it_is_spelled(boundary: str) -> None:
    faults = [Fault(boundary, kind, 2, 3) for kind in sorted(KINDS[boundary])]

    assert parse(spelled(faults)) == faults


@pytest.mark.parametrize(
    "text", ["forward", "forward:rain", "moon:full", "forward:nan@0", "forward:nanx0", "gpu:0/x:y"]
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no fault"):
        parse(text)


def test_a_fault_is_of_its_device_and_of_its_first_lives() -> None:
    faults = parse("cpu:0/forward:nanx2,load:oom")

    assert [[f.boundary for f in of_life(faults, "cpu:0", life)] for life in (1, 2, 3)] == [
        ["forward", "load"],
        ["forward"],
        [],
    ]
    assert [f.boundary for f in of_life(faults, "cpu:1", 1)] == ["load"]


def test_a_fault_strikes_its_pass_and_no_other() -> None:
    passes = Passes(parse("forward:nan@2,forward:oom@4,sample:oom"), "forward")

    assert [passes.strikes() for _ in range(5)] == [None, "nan", None, "oom", None]


def test_what_has_struck_is_over() -> None:
    passes = Passes(parse("forward:nan"), "forward")

    assert passes
    passes.strikes()
    assert not passes
