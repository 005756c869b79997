"""Ranks meet in a store, agree, and hear of each other's refusals; each rank is a thread here."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from cortex.ipc.messages import Failed
from cortex.runtime.device.collectives import GlooCollectives, RankCollectives
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.refusal import PeerLost, Refused
from cortex.runtime.device.rendezvous import Place, RefusedElsewhere, SharedLoad, least

CPU = torch.device("cpu")
T = TypeVar("T")


class Clock:
    """Goes on by a minute each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 60.0
        return self.now


def places(meeting: Path, ranks: int) -> list[Place]:
    return [Place("g", rank, ranks, meeting=meeting, device=CPU) for rank in range(ranks)]


def on_all(places: list[Place], act: Callable[[Place], T]) -> list[T]:
    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(act, places))


def test_all_ranks_that_join_add_up(tmp_path: Path) -> None:
    def act(place: Place) -> float:
        place.join()
        return place.checked_sum()

    assert on_all(places(tmp_path, 3), act) == [6.0] * 3


def test_a_rank_that_does_not_come_is_waited_for_with_beats_and_then_named(tmp_path: Path) -> None:
    beats: list[None] = []
    place = Place(
        "g",
        0,
        2,
        meeting=tmp_path,
        device=CPU,
        beat=lambda: beats.append(None),
        clock=Clock(),
    )

    with pytest.raises(Refused, match="rank 1 did not come in 120 s") as refused:
        place.join()

    assert refused.value.code == "peer_lost"
    assert beats


def test_ranks_load_by_the_least_of_their_limits_but_with_their_own_workspace(
    tmp_path: Path,
) -> None:
    limits = [Limits(512, 8, 100, 7, 9), Limits(256, 9, 120, 6, 11)]

    def act(place: Place) -> tuple[Limits, torch.Tensor, torch.Tensor]:
        load = place.begin_load()
        group = load.begin()
        assert isinstance(group.collectives, RankCollectives)
        x = torch.ones(1, 2) * (place.rank + 1)
        muted = group.collectives.all_reduce(x.clone())
        agreed = load.agree(limits[place.rank])
        return agreed, muted, load.be_ready().all_reduce(x)

    first, last = on_all(places(tmp_path, 2), act)

    assert first[0] == Limits(256, 8, 100, 7, 9)
    assert last[0] == Limits(256, 8, 100, 6, 9)
    assert first[1].tolist() == [[1.0, 1.0]], "mute until all are ready"
    assert first[2].tolist() == last[2].tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("stage", ["begin", "look", "agree", "be_ready"])
def test_what_a_rank_is_refused_by_reaches_the_others_at_every_stage(
    tmp_path: Path, stage: str
) -> None:
    limits = Limits(1, 1, 1, 1)
    stages: dict[str, Callable[[SharedLoad], object]] = {
        "begin": SharedLoad.begin,
        "look": SharedLoad.look,
        "agree": lambda load: load.agree(limits),
        "be_ready": SharedLoad.be_ready,
    }
    order = ["begin", "agree", "be_ready"]
    before = order[: order.index("agree" if stage == "look" else stage)]

    def act(place: Place) -> Refused | None:
        load = place.begin_load()
        for earlier in before:
            stages[earlier](load)
        if place.rank == 1:
            load.give_up(Failed("insufficient_memory", "too large", numbers={"kv_bytes": 5}))
            return None
        try:
            while True:  # only a look may come too early
                stages[stage](load)
        except RefusedElsewhere as exc:
            load.give_up(None)
            return exc

    refused, _ = on_all(places(tmp_path, 2), act)

    assert refused is not None
    assert (refused.code, str(refused)) == ("insufficient_memory", "on rank 1: too large")
    assert refused.numbers == {"kv_bytes": 5}


def test_a_load_that_failed_is_nothing_to_the_next(tmp_path: Path) -> None:
    def act(place: Place) -> Limits:
        load = place.begin_load()
        load.give_up(Failed("x", "y") if place.rank else None)
        again = place.begin_load()
        again.begin()
        return again.agree(Limits(place.rank + 4, 1, 1, 1))

    assert [limits.max_context_tokens for limits in on_all(places(tmp_path, 2), act)] == [4, 4]


def test_without_a_directory_to_meet_in_nobody_waits(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no directory to meet in"):
        places(tmp_path / "gone", 2)


def test_the_least_of_all_takes_every_limit() -> None:
    assert least([Limits(5, 6, 7, 8, 9), Limits(9, 8, 7, 6, 5)], Limits(5, 6, 7, 8, 9)) == Limits(
        5, 6, 7, 8, 5
    )


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    parts = torch.randn(4, 33, 48) * torch.tensor([1e-3, 1.0, 1e3, 1e6])[:, None, None]

    def act(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        made = place.meet(place._talk("test"))
        mine = parts[place.rank]
        alone = torch.cat([made.all_reduce(mine[row : row + 1].clone()) for row in range(33)])
        return alone, made.all_reduce(mine.clone())

    for alone, together in on_all(places(tmp_path, 4), act):
        assert torch.equal(alone, together)
        assert torch.equal(together, ((parts[0] + parts[1]) + parts[2]) + parts[3])


def test_columns_are_gathered_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    def act(place: Place) -> torch.Tensor:
        made = place.meet(place._talk("test"))
        assert isinstance(made, GlooCollectives)
        return made.all_gather(torch.tensor([[0, 1], [10, 11]]) + 2 * place.rank)

    for gathered in on_all(places(tmp_path, 2), act):
        assert gathered.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_a_rank_that_goes_is_a_lost_peer(tmp_path: Path) -> None:
    def act(place: Place) -> None:
        made = place.meet(place._talk("test"))
        if place.rank == 0:
            with pytest.raises(PeerLost, match="a collective failed"):
                made.all_reduce(torch.ones(1, 1))
        else:
            del made

    on_all(places(tmp_path, 2), act)


def test_mute_collectives_return_what_there_is() -> None:
    mute = RankCollectives(None, 3)  # type: ignore[arg-type] # nobody is asked
    x = torch.tensor([[1.0, 2.0]])

    assert mute.all_reduce(x) is x
    assert mute.all_gather(x).tolist() == [[1.0, 2.0] * 3]
