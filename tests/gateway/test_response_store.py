"""What Responses go on from."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cortex.gateway.catalogue import BUILT_IN
from cortex.gateway.config import Responses
from cortex.gateway.response_store import ResponseStore, Stored
from cortex.gateway.state import StateFile
from cortex.gateway.written import Written
from cortex.ipc.errors import InvalidRequest, PreviousResponseNotFound, ResponseNotFound
from fakes import gateway_config

MIB = 2**20


@asynccontextmanager
async def opened(path: Path | None = None, **limits: Any) -> AsyncIterator[ResponseStore]:
    """A store, as a gateway that starts has it."""
    config = gateway_config(responses=Responses(**limits))
    async with StateFile(path) as state:
        store = ResponseStore(state, Written(config, BUILT_IN))
        await store.read()
        yield store


def name(number: int) -> str:
    return f"resp_{number:032x}"


def keep(
    store: ResponseStore,
    number: int,
    previous: int | None = None,
    *,
    key: str | None = "laptop",
    text: str = "",
) -> None:
    """Store the response *number*, of two items, which goes on from *previous*."""
    own = f"msg_{number:032x}_0"
    came = {"type": "message", "id": f"msg_{number:032x}_i0", "role": "user", "content": text}
    response: dict[str, Any] = {
        "id": name(number),
        "previous_response_id": None if previous is None else name(previous),
        "output": [{"type": "message", "id": own, "role": "assistant", "content": []}],
        "model": "m",
    }
    store.of(key).keep(response, msgspec.Raw(msgspec.json.encode([came])))


def stored(store: ResponseStore, *numbers: int, key: str | None = "laptop") -> list[int]:
    """Return those of *numbers* that are still there."""

    def is_there(number: int) -> bool:
        try:
            return store.of(key).one(name(number)).id == name(number)
        except ResponseNotFound:
            return False

    return [number for number in numbers if is_there(number)]


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [f"{int(item['id'][4:36], 16)}{item['id'][36:]}" for item in items]


async def test_a_response_comes_back_as_it_was() -> None:
    async with opened() as store:
        keep(store, 1)

        found = store.of("laptop").one(name(1))

    assert found.response == {
        "id": name(1),
        "previous_response_id": None,
        "output": found.output,
        "model": "m",
    }
    assert ids(found.items) == ["1_i0", "1_0"]


async def test_a_conversation_is_everything_up_to_a_response() -> None:
    async with opened() as store:
        keep(store, 1)
        keep(store, 2, 1)
        keep(store, 3, 2)
        keep(store, 4, 1)

        found = store.of("laptop").conversation(name(3))

    assert ids(found) == ["1_i0", "1_0", "2_i0", "2_0", "3_i0", "3_0"]


async def test_another_key_does_not_find_it() -> None:
    async with opened() as store:
        keep(store, 1)
        own, other = store.of("laptop"), store.of("phone")

        with pytest.raises(PreviousResponseNotFound):
            other.conversation(name(1))
        with pytest.raises(ResponseNotFound):
            other.drop(name(1))
        with pytest.raises(InvalidRequest):
            other.item(f"msg_{1:032x}_0", "input[0]")
        with pytest.raises(ResponseNotFound):
            store.of(None).one(name(1))

        assert own.one(name(1)).id == name(1)


async def test_nobody_finds_what_nobody_has_stored() -> None:
    async with opened() as store:
        keep(store, 1, key=None)

        assert stored(store, 1, key=None) == [1]
        assert stored(store, 1, key="laptop") == []


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path / "cortex.db") as store:
        keep(store, 1)
        keep(store, 2, 1)
    async with opened(tmp_path / "cortex.db") as store:
        found = store.of("laptop").conversation(name(2))

    assert ids(found) == ["1_i0", "1_0", "2_i0", "2_0"]


async def test_the_oldest_go_first() -> None:
    async with opened(max_stored=2) as store:
        for number in (1, 2, 3):
            keep(store, number)

        assert stored(store, 1, 2, 3) == [2, 3]


async def test_the_oldest_go_for_large_ones() -> None:
    async with opened(max_stored_mb=2) as store:
        for number in (1, 2, 3):
            keep(store, number, text="x" * (MIB - 1000))
        assert stored(store, 1, 2, 3) == [2, 3]

        keep(store, 4, text="x" * 3 * MIB)
        assert stored(store, 2, 3, 4) == []


async def test_what_is_gone_on_from_stays_young() -> None:
    async with opened(max_stored=3) as store:
        keep(store, 1)
        keep(store, 2, 1)
        keep(store, 3)
        store.of("laptop").conversation(name(2))

        keep(store, 4)

        assert stored(store, 1, 2, 3, 4) == [1, 2, 4]


async def test_what_has_gone_is_gone_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path / "cortex.db", max_stored=2) as store:
        for number in (1, 2, 3):
            keep(store, number)
        store.of("laptop").conversation(name(2))
        store.of("laptop").drop(name(3))
    async with opened(tmp_path / "cortex.db") as store:
        assert stored(store, 1, 2, 3) == [2]


async def test_who_is_young_is_so_after_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path / "cortex.db") as store:
        for number in (1, 2, 3):
            keep(store, number)
        store.of("laptop").conversation(name(1))
    async with opened(tmp_path / "cortex.db", max_stored=2) as store:
        assert stored(store, 1, 2, 3) == [1, 3]


async def test_a_smaller_limit_counts_from_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path / "cortex.db") as store:
        for number in (1, 2, 3):
            keep(store, number)
    async with opened(tmp_path / "cortex.db", max_stored=1):
        pass
    async with opened(tmp_path / "cortex.db") as store:
        assert stored(store, 1, 2, 3) == [3]


async def test_a_conversation_with_a_part_missing_is_refused_in_words() -> None:
    async with opened() as store:
        keep(store, 1)
        keep(store, 2, 1)
        own = store.of("laptop")
        own.drop(name(1))

        with pytest.raises(PreviousResponseNotFound, match=f"{name(1)!r}, earlier in its"):
            own.conversation(name(2))
        with pytest.raises(PreviousResponseNotFound, match="never stored") as caught:
            own.conversation(name(9))

    assert (caught.value.status, caught.value.param) == (400, "previous_response_id")


async def test_an_item_is_found_by_its_id() -> None:
    async with opened() as store:
        keep(store, 1)
        own = store.of("laptop")

        assert own.item(f"msg_{1:032x}_0", "input[0]")["role"] == "assistant"
        assert own.item(f"msg_{1:032x}_i0", "input[0]")["role"] == "user"


async def test_many_items_of_a_response_are_looked_up_at_the_price_of_one() -> None:
    class Counting(ResponseStore):
        reads = 0

        def get(self, name: str, key: str) -> Stored | None:
            self.reads += 1
            return super().get(name, key)

    async with StateFile(None) as state:
        store = Counting(state, Written(gateway_config(), BUILT_IN))
        keep(store, 1)
        own = store.of("laptop")

        for part in ("i0", "0"):
            own.item(f"msg_{1:032x}_{part}", "input[0]")

    assert store.reads == 1


@pytest.mark.parametrize("item_id", ["msg_1", "rs_abc", f"msg_{9:032x}_0", f"msg_{1:032x}_7"])
async def test_an_item_that_is_not_there_is_refused_with_its_place(item_id: str) -> None:
    async with opened() as store:
        keep(store, 1)

        with pytest.raises(InvalidRequest) as caught:
            store.of("laptop").item(item_id, "input[3]")

    assert caught.value.param == "input[3].id"


@pytest.mark.parametrize(
    ("limits", "stores"),
    [({}, True), ({"max_stored": 0}, False), ({"max_stored_mb": 0}, False)],
)
async def test_the_operator_may_let_nothing_be_stored(limits: dict[str, Any], stores: bool) -> None:
    async with opened(**limits) as store:
        assert store.stores is stores
