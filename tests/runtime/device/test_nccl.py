"""How NCCL is found and called; what it computes is for tests/gpu. The library is a fake one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore  # type: ignore[attr-defined] # torch's

from cortex.runtime.device import nccl
from cortex.runtime.device.nccl import NcclCollectives, UniqueId
from cortex.runtime.device.refusal import DeviceLost, PeerLost


class FakeNccl:
    """Notes its calls by name; each returns what ``results`` says, else 0."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.results: dict[str, int] = {}
        self.called = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "ncclGetErrorString":
            return lambda result: f"error {result}".encode()

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "ncclCommInitRank":
                arguments[0]._obj.value = 77
            self.called.set()
            return self.results.get(name, 0)

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNccl:
    fake = FakeNccl()
    monkeypatch.setattr(nccl, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(NcclCollectives, "_stream", lambda _: 0)
    monkeypatch.setattr(NcclCollectives, "_wait", lambda _: fake.calls.append("wait"))
    return fake


class AnyLibrary:
    """Has every function."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*_: Any) -> int:
            return 0

        setattr(self, name, call)
        return call


def made() -> NcclCollectives:
    return NcclCollectives(bytes(nccl.UNIQUE_ID_BYTES), torch.device("cpu"), 0, 2)


def test_an_identity_has_the_size_that_nccl_says() -> None:
    assert ctypes.sizeof(UniqueId) == nccl.UNIQUE_ID_BYTES == 128


def test_a_sum_is_in_place_and_columns_are_gathered(library: FakeNccl) -> None:
    collectives = made()
    x = torch.zeros(3, 4)

    assert collectives.all_reduce(x) is x
    assert collectives.all_gather(x).shape == (3, 8)
    assert library.calls == ["ncclCommInitRank", "ncclAllReduce", "ncclAllGather"]


def test_ranks_that_meet_make_every_connection_before_they_go_on(
    library: FakeNccl, tmp_path: Path
) -> None:
    store = FileStore(str(tmp_path / "store"), 1)

    NcclCollectives.meeting(store, torch.device("cpu"), rank=0, ranks=1)

    pairs = ["ncclAllReduce", "ncclAllGather"] * len(nccl.CONNECTING_ELEMENTS)
    ends = ["wait", "ncclCommGetAsyncError"]
    assert library.calls == ["ncclGetUniqueId", "ncclCommInitRank", *pairs, *ends]


def test_a_communicator_that_does_not_connect_is_given_up(
    library: FakeNccl, tmp_path: Path
) -> None:
    library.results["ncclAllGather"] = 2
    store = FileStore(str(tmp_path / "store"), 1)

    with pytest.raises(PeerLost, match="ncclAllGather failed"):
        NcclCollectives.meeting(store, torch.device("cpu"), rank=0, ranks=1)

    assert library.calls[-1] == "ncclCommAbort"


def test_the_ranks_are_of_this_host_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: AnyLibrary())
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "1")

    nccl.library.__wrapped__()

    assert os.environ.pop("NCCL_SOCKET_IFNAME") == "lo"
    assert os.environ["NCCL_GRAPH_REGISTER"] == "1"


@pytest.mark.parametrize("call", ["ncclCommInitRank", "ncclAllReduce", "ncclAllGather"])
def test_what_fails_is_a_lost_peer_in_words(library: FakeNccl, call: str) -> None:
    library.results[call] = 3

    def use() -> None:
        collectives = made()
        collectives.all_gather(collectives.all_reduce(torch.zeros(1, 1)))

    with pytest.raises(PeerLost, match=f"{call} failed: error 3"):
        use()


def test_what_failed_meanwhile_is_found_by_asking(library: FakeNccl) -> None:
    collectives = made()
    collectives.check()
    library.results["ncclCommGetAsyncError"] = 6

    with pytest.raises(PeerLost, match="error 6"):
        collectives.check()


def test_it_is_given_up_once_and_nobody_waits_for_it(library: FakeNccl) -> None:
    collectives = made()
    library.called.clear()

    collectives.close()

    assert library.called.wait(20.0)
    collectives.abort()
    assert library.calls == ["ncclCommInitRank", "ncclCommDestroy"]


def test_an_end_that_fails_is_only_noted(library: FakeNccl) -> None:
    library.results["ncclCommAbort"] = 2

    made().abort()

    assert library.calls[-1] == "ncclCommAbort"


def test_where_there_is_no_library_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: str) -> ctypes.CDLL:
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", none)

    with pytest.raises(DeviceLost, match=r"libnccl.so.2 is not here"):
        nccl.library.__wrapped__()
