"""What operators see: tables, and sentences about what is wrong."""

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from cortex.gateway.tables import (
    drain_words,
    load_words,
    placement_words,
    print_fleet,
    print_models,
    print_placement,
    print_usage,
    state_of,
)
from cortex.ipc.fleet_api import (
    CandidateView,
    Drain,
    FleetDevice,
    FleetModel,
    FleetNode,
    FleetView,
    LoadView,
    PlacementView,
    UsageRow,
    UsageView,
)
from cortex.ipc.node_api import Activation, ActivationFailure, Progress, Servable
from cortex.ipc.openai_answers import ModelEntry, ModelList
from typed import cells

MB = 2**20
HEALTH = {"status": "ok", "nodes": {"healthy": 1, "total": 1}}


def a_model(name: str = "m", status: Any = "loaded", **changes: Any) -> FleetModel:
    plain = FleetModel(
        name,
        "torch",
        status,
        [],
        Servable(ok=True),
        node_id=name,
        in_flight=0,
        queue_depth=0,
        idle_seconds=0.0,
        unload_in_seconds=None,
        pinned=False,
        residency_class=100,
        footprint_mb=0,
    )
    return msgspec.structs.replace(plain, **changes)


def a_node(*models: FleetModel, **changes: Any) -> FleetNode:
    plain = FleetNode(
        name="a",
        endpoint="http://a",
        is_engine=False,
        healthy=True,
        since=0.0,
        failures=0,
        error=None,
        breaker="closed",
        takes_requests=True,
        why=None,
        draining=False,
        drain=None,
        activation=None,
        devices=[],
        models=list(models),
        load=[],
    )
    return msgspec.structs.replace(plain, **changes)


def shown(*nodes: FleetNode, loads: tuple[LoadView, ...] = (), width: int = 140) -> str:
    file = io.StringIO()
    view = FleetView(list(nodes), list(loads), requests_in_flight=0, draining=False)
    print_fleet(Console(file=file, width=width), HEALTH, view)
    return file.getvalue()


def test_a_device_is_shown_with_its_memory_and_its_warmth() -> None:
    device = FleetDevice(
        0, "cuda:0", "ready", vram_used_mb=10, vram_free_mb=990, temp_c=61, vram_total_mb=1000
    )

    (row,) = cells(shown(a_node(devices=[device])))

    assert (row[:2], row[3:]) == (["a", "up"], ["cuda:0", "990", "10", "1000", "61"])


def test_an_engine_is_shown_as_one() -> None:
    (row,) = cells(shown(a_node(is_engine=True)))

    assert (row[:2], row[3]) == (["a", "up"], "engine")


def test_a_device_that_is_not_ready_says_so_and_why() -> None:
    device = FleetDevice(0, "cuda:0", "poisoned", last_failure="four failures in ten minutes")

    text = shown(a_node(devices=[device]))

    assert cells(text)[0][3] == "cuda:0, poisoned"
    assert text.endswith("cuda:0 on a: four failures in ten minutes\n")


def test_a_model_is_shown_with_what_it_does_and_holds() -> None:
    model = a_model(in_flight=2, queue_depth=1, idle_seconds=5.4, footprint_mb=300, pinned=True)

    assert cells(shown(a_node(model)))[-1] == [
        *("m", "a", "loaded, pinned", "2", "1", "5 s", "300", "100"),
    ]


def test_a_long_id_is_shown_whole_on_a_narrow_terminal() -> None:
    name = "file:/srv/models[1]/" + "x" * 100 + ".gguf"

    text = shown(a_node(a_model(name)), width=80)

    assert name in "".join(row[0] for row in cells(text))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("model", "trouble"),
    [
        (a_model(status="failed", failure="no such file"), "m on a: no such file"),
        (a_model(servable=Servable(ok=False, reason="low_memory")), "m on a: low_memory"),
        (a_model(servable=Servable(ok=False, detail="3 MB")), "m on a: 3 MB"),
        (a_model(status="recovering", servable=Servable(ok=False, reason="recovering")), None),
    ],
    ids=lambda value: getattr(value, "status", None),
)
def test_what_is_wrong_with_a_model_is_said_once(model: FleetModel, trouble: str | None) -> None:
    last = shown(a_node(model)).splitlines()[-1]

    assert last.strip(" ╵") == (trouble or "")


@pytest.mark.parametrize(
    ("node", "trouble"),
    [
        (
            a_node(healthy=False, error="node a cannot be reached", why="down: cannot be reached"),
            "a: cannot be reached",
        ),
        (a_node(why="closed by its breaker"), "a: closed by its breaker"),
        (
            a_node(why="drained by an operator", drain=Drain(False, 2, ["m"])),
            "a: drained by an operator: 2 requests run, models left: m",
        ),
        (
            a_node(activation=Activation(failed=[ActivationFailure("m", "no network")])),
            "m on a: no network",
        ),
    ],
    ids=["down", "breaker", "drained", "activation"],
)
def test_what_is_wrong_with_a_node_is_said_once(node: FleetNode, trouble: str) -> None:
    text = shown(node)

    assert [line for line in text.splitlines() if line.startswith(("a:", "m on"))] == [trouble]


@pytest.mark.parametrize(
    ("node", "state"),
    [
        (a_node(), "up"),
        (a_node(healthy=False, draining=True), "down"),
        (a_node(draining=True), "stopping"),
        (a_node(draining=True, drain=Drain(False, 0, ["m"])), "draining"),
        (a_node(draining=True, drain=Drain(True, 0, [])), "drained"),
        (a_node(breaker="half_open"), "up, breaker half open"),
    ],
    ids=["up", "down", "stopping", "draining", "drained", "breaker"],
)
def test_the_state_of_a_node_is_one_word(node: FleetNode, state: str) -> None:
    assert state_of(node) == state


def test_a_model_on_its_way_shows_how_far_it_is() -> None:
    progress = Progress("downloading", 38 * MB, 94 * MB)

    assert "downloading 40 %, 38 of 94 MB" in shown(
        a_node(a_model("m", "loading", progress=progress))
    )


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (LoadView("m", "asking", 1.0, 0), "asking the nodes what it needs"),
        (
            LoadView("m", "waiting", 1.0, 2, why="waiting for x to finish"),
            "waiting for x to finish",
        ),
        (LoadView("m", "loading", 1.0, 2, "a", None, Progress("loading")), "loading"),
    ],
    ids=["asking", "waiting", "loading"],
)
def test_a_load_is_shown_with_what_it_is_at(load: LoadView, words: str) -> None:
    assert load_words(load) == words
    assert cells(shown(a_node(), loads=(load,)))[-1] == [
        *("m", load.node or "", words, "1 s", str(load.waiting_requests)),
    ]


def test_a_drain_that_is_over_says_so() -> None:
    assert drain_words(Drain(True, 0, [])) == "drained by an operator: nothing is left there"


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        (PlacementView("m", [], chosen="a", fits="now"), "on a; nothing would have to go"),
        (
            PlacementView("m", [], chosen="a", fits="after_evicting", evicts=("x", "y")),
            "on a; x, y would be unloaded first",
        ),
        (
            PlacementView("m", [], chosen="a", fits="after_waiting", evicts=("x",)),
            "on a, once x may go",
        ),
        (
            PlacementView(
                "m",
                [CandidateView("a", "after_waiting", "0 devices are ready")],
                chosen="a",
                fits="after_waiting",
            ),
            "m would have to wait for a: 0 devices are ready",
        ),
        (PlacementView("m", [], refusal={"message": "no room for 'm'"}), "no room for 'm'"),
        (
            PlacementView("m", [], chosen="b", fits="now", loaded_on=("a",)),
            "m is loaded on a",
        ),
    ],
    ids=["now", "evicting", "waiting", "later", "refused", "loaded"],
)
def test_a_placement_is_one_sentence(placed: PlacementView, words: str) -> None:
    assert placement_words(placed).endswith(words)


def test_a_placement_shows_the_numbers_of_every_node() -> None:
    file = io.StringIO()
    numbers = CandidateView("a", "after_evicting", "300 MB of 10 MB free", 300, "measured", 10, 400)
    here = msgspec.structs.replace(numbers, evicts=("x",), least_mb=90, least_source="estimate")

    print_placement(Console(file=file, width=120), PlacementView("m", [here], chosen="a"))

    text = file.getvalue()
    assert cells(text) == [
        ["a", "after evicting", "300", "measured", "90", "estimate", "10", "400", "x"]
    ]
    assert text.endswith("a: 300 MB of 10 MB free\n")


def test_models_are_listed_with_what_is_known() -> None:
    file = io.StringIO()
    places = [{"node": "a", "status": "loaded"}, {"node": "b", "status": "loading"}]
    known = ModelEntry("m", 0, "cortex", loaded=True, locations=places, context_length=4096)

    print_models(Console(file=file), ModelList([known, ModelEntry("n", 0, "cortex")]))

    assert cells(file.getvalue()) == [
        ["m", "yes", "a (loaded), b (loading)", "4096"],
        ["n", "", "", ""],
    ]


def test_usage_is_added_up() -> None:
    file = io.StringIO()
    rows = [
        UsageRow("laptop", "m", "2026-11-20", 1, 10, 4, 100),
        UsageRow("-", "n", "2026-11-21", 2, 20, 0, 200),
    ]

    print_usage(Console(file=file, width=120), UsageView(rows))

    assert cells(file.getvalue()) == [
        ["2026-11-20", "laptop", "m", "1", "10", "4", "100"],
        ["2026-11-21", "-", "n", "2", "20", "0", "200"],
        ["all", "", "", "3", "30", "4", "300"],
    ]


def test_no_usage_is_an_empty_table() -> None:
    file = io.StringIO()

    print_usage(Console(file=file), UsageView([]))

    assert cells(file.getvalue()) == []
