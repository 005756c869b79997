"""scripts/tp-smoke says how far devices get together, and by its status whether all the way."""

import subprocess
from pathlib import Path

import pytest

SMOKE = Path(__file__).resolve().parents[2] / "scripts" / "tp-smoke"


def smoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SMOKE, *arguments], capture_output=True, text=True, check=False)


def test_two_devices_give_a_token_together() -> None:
    ended = smoke("--devices", "cpu:0,cpu:1")

    *steps, last = ended.stdout.splitlines()
    assert (last, ended.returncode) == ("status=ok", 0), ended
    assert [line.split()[0] for line in steps] == [
        *("spawn", "ping", "join", "check", "load", "token", "unload", "shutdown")
    ]
    assert "over gloo" in steps[2]
    assert "the sum is 3 on every rank" in steps[3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices", "cpu:0", "--model", "/no/such/model"], "step=load reason=cpu:0: bad_check"),
        (["--devices", "cuda:99"], "step=spawn reason=device 'cuda:99' cannot be used"),
    ],
)
def test_a_step_that_fails_is_named_with_its_reason(arguments: list[str], words: str) -> None:
    ended = smoke(*arguments)

    assert ended.returncode == 1
    assert f"status=failed {words}" in ended.stdout.splitlines()[-1]


def test_what_is_no_device_is_refused_before_anything_starts() -> None:
    ended = smoke("--devices", "cpu:0,gpu:1")

    assert (ended.returncode, ended.stdout) == (2, "")
    assert "argument --devices: expected cpu:N or cuda:N, not cpu:0,gpu:1" in ended.stderr
