"""Which node a model goes to, what has to leave it, and the arithmetic of a refusal."""

from dataclasses import replace
from typing import Any

import pytest

from cortex.gateway.dry_run import view_of
from cortex.gateway.eviction import Rules
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.placement import Candidate, Incoming, Need, candidates
from cortex.gateway.refusal import refusal
from cortex.gateway.room import Claim
from cortex.ipc.errors import Unloadable
from memory_fleet import NOW, a_fleet, a_node, incoming

GIB = 1024
RULES = Rules()


def best(snapshot: FleetSnapshot, model: Incoming, rules: Rules = RULES) -> Candidate:
    return candidates(snapshot, model, rules)[0]


def gone(candidate: Candidate) -> list[str]:
    return [victim.place[1] for victim in candidate.victims]


def refused(snapshot: FleetSnapshot, model: Incoming) -> tuple[int, str, int | None, str]:
    error = refusal(model, candidates(snapshot, model, RULES))
    return error.status, error.code, error.retry_after_seconds, str(error)


def down(node: Node) -> Node:
    return replace(node, is_healthy=False)


def test_a_model_whose_need_nobody_knows_goes_where_most_is_free() -> None:
    found = best(a_fleet(a_node("a", [10]), a_node("b", [30]), a_node("c", [20])), incoming())

    assert (found.node.name, found.fits) == ("b", "now")
    assert found.why == "30 MB free, and nobody knows what it needs"


def test_ties_go_by_name() -> None:
    assert best(a_fleet(a_node("b"), a_node("a")), incoming(mb=10)).node.name == "a"


def test_a_group_of_devices_holds_what_none_of_them_could() -> None:
    snapshot = a_fleet(a_node("a", [32 * GIB, 32 * GIB], {"idle": [GIB, 0]}))

    found = best(snapshot, incoming(mb=42 * GIB, tensor_parallel=2))

    assert (found.fits, found.devices, found.share_mb, gone(found)) == (
        "now",
        (0, 1),
        21 * GIB,
        [],
    )


def test_each_device_of_a_group_has_to_hold_its_share() -> None:
    snapshot = a_fleet(a_node("a", [100, 20]))

    assert best(snapshot, incoming(mb=80, tensor_parallel=2)).fits == "never"


def test_a_group_is_made_of_the_devices_with_most_room() -> None:
    snapshot = a_fleet(a_node("a", [50, 50, 50], {"x": [40, 0, 0]}))

    assert best(snapshot, incoming(mb=80, min_devices=2)).devices == (1, 2)


def test_devices_that_others_share_otherwise_are_left_alone_where_there_are_more() -> None:
    snapshot = a_fleet(a_node("a", [100, 60, 100, 60], {"x": [10, 10, 0, 0]}))

    found = best(snapshot, incoming(mb=80, tensor_parallel=2))

    assert (found.fits, found.devices) == ("now", (2, 3))


def test_a_model_that_shares_some_of_a_groups_devices_has_to_go_however_much_is_free() -> None:
    snapshot = a_fleet(a_node("a", [100, 100, 100], {"x": [10, 10, 0]}))

    found = best(snapshot, incoming(mb=30, tensor_parallel=3))

    assert (found.fits, gone(found)) == ("after_evicting", ["x"])


def test_a_model_that_shares_some_of_a_groups_devices_and_is_busy_is_waited_for() -> None:
    snapshot = a_fleet(a_node("a", [100, 100, 100], {"x": [10, 10, 0]}, busy=["x"]))

    found = best(snapshot, incoming(mb=30, tensor_parallel=3))

    assert (found.fits, gone(found)) == ("after_waiting", ["x"])


def test_a_group_that_is_crossed_for_good_is_no_place() -> None:
    snapshot = a_fleet(a_node("a", [100, 100, 100], {"x": [10, 10, 0]}), pinned=[("a", "x")])

    assert best(snapshot, incoming(mb=30, tensor_parallel=3)).fits == "no"


def test_what_leaves_a_crossed_group_counts_as_free() -> None:
    snapshot = a_fleet(a_node("a", [100, 100, 100], {"x": [60, 60, 0], "y": [0, 0, 90]}))

    found = best(snapshot, incoming(mb=150, tensor_parallel=3))

    assert gone(found) == ["x", "y"]


def test_a_model_of_one_device_may_stay_where_a_group_comes() -> None:
    snapshot = a_fleet(a_node("a", [100, 100], {"x": [10, 0]}))

    assert best(snapshot, incoming(mb=80, tensor_parallel=2)).fits == "now"


def test_nothing_is_evicted_where_there_is_room_anywhere() -> None:
    crowded = a_node("a", [1000], {"old": [900]})
    small = a_node("b", [200])

    found = best(a_fleet(crowded, small), incoming(mb=150))

    assert (found.node.name, gone(found)) == ("b", [])


def test_of_several_nodes_that_are_full_the_one_whose_model_is_missed_least_is_cleared() -> None:
    nodes = [a_node(name, [100], {f"on-{name}": [90]}) for name in "abc"]
    used = {("a", "on-a"): 30.0, ("b", "on-b"): 10.0, ("c", "on-c"): 20.0}

    found = best(a_fleet(*nodes, used=used), incoming(mb=50))

    assert (found.node.name, gone(found)) == ("b", ["on-b"])


def test_lower_classes_are_missed_less() -> None:
    nodes = [a_node(name, [100], {f"on-{name}": [90]}) for name in "ab"]
    rules = Rules(classes={"on-a": 50})
    used = {("a", "on-a"): 30.0, ("b", "on-b"): 10.0}

    assert best(a_fleet(*nodes, used=used), incoming(mb=50), rules).node.name == "a"


def test_a_place_that_is_pinned_for_it_comes_first() -> None:
    snapshot = a_fleet(a_node("a", [90]), a_node("b", [80]), pinned=[("b", "m")])

    assert best(snapshot, incoming(mb=10)).node.name == "b"


def test_idle_models_go_before_busy_ones_are_waited_for() -> None:
    busy = a_node("a", [100], {"x": [90]}, busy=["x"])
    idle = a_node("b", [100], {"y": [90]})

    assert best(a_fleet(busy, idle), incoming(mb=50)).node.name == "b"


def test_a_busy_model_is_waited_for_where_nothing_else_helps() -> None:
    found = best(a_fleet(a_node("a", [100], {"x": [90]}, busy=["x"])), incoming(mb=50))

    assert (found.fits, gone(found)) == ("after_waiting", ["x"])
    assert found.why == "50 MB (measured) of 10 MB free, once x may go"


def test_where_not_all_it_wants_is_free_the_least_it_can_live_with_will_do() -> None:
    model = replace(incoming(), needs={"a": Need(80, "estimate", least_mb=30)})
    held = a_node("a", [100], {"x": [60]}, busy=["x"])

    found = best(a_fleet(held), model)

    assert (found.fits, found.share_mb) == ("now", 30)


def test_idle_models_go_before_it_is_squeezed() -> None:
    model = replace(incoming(), needs={"a": Need(80, "estimate", least_mb=30)})

    found = best(a_fleet(a_node("a", [100], {"x": [60]})), model)

    assert (found.fits, found.share_mb, gone(found)) == ("after_evicting", 80, ["x"])


def test_what_may_not_evict_takes_only_what_is_free() -> None:
    polite = replace(incoming(mb=50), may_evict=False)

    assert best(a_fleet(a_node("a", [100], {"x": [60]})), polite).fits == "no"


@pytest.mark.parametrize(
    ("claim", "fits"),
    [
        (Claim(("a", "n"), 100, "loading", {0: 60}, accounted_mb={0: 100}), "after_waiting"),
        (Claim(("a", "n"), 100, "loading", {0: 60}, accounted_mb={0: 160}), "now"),
        (Claim(("a", "n"), 100, "waiting", {0: 60}), "after_waiting"),
        (Claim(("a", "n"), 100, "clearing", {0: 1}), "after_waiting"),
        (Claim(("a", "n"), 900, "loading", {0: 60}, accounted_mb={0: 100}), "no"),
        (Claim(("b", "n"), 100, "loading", {0: 60}, accounted_mb={0: 100}), "now"),
    ],
    ids=["to come", "taken already", "waiting", "clearing", "higher class", "elsewhere"],
)
def test_memory_that_is_spoken_for_is_not_free(claim: Claim, fits: str) -> None:
    found = candidates(a_fleet(a_node("a", [100])), incoming(mb=50), RULES, [claim])

    assert found[0].fits == fits


def test_a_victim_of_somebody_else_is_not_one_again() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [90]}))
    first = best(snapshot, incoming(mb=50))
    claim = Claim(("a", "m"), 100, "waiting", {0: 50}, first.victims)

    second = candidates(snapshot, incoming("n", mb=60), RULES, [claim])[0]

    assert (second.fits, gone(second)) == ("after_waiting", [])


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ({"pinned_on": ("b",)}, "it may run on b only"),
        ({"min_devices": 2}, "it has 1 devices, 2 are needed"),
        ({"min_device_vram_mb": 2000}, "it has 0 devices of 2000 MB, 1 are needed"),
        ({"devices": [7]}, "it has 0 devices, 1 are needed"),
    ],
)
def test_a_node_that_could_never_hold_it_says_why(profile: dict[str, Any], why: str) -> None:
    found = best(a_fleet(a_node("a")), incoming(mb=1, **profile))

    assert (found.fits, found.why) == ("never", why)


def test_of_a_node_that_is_not_known_nothing_is_ruled_out() -> None:
    unknown = replace(a_node("a"), discovery=None)

    assert best(a_fleet(unknown), incoming(mb=1, min_device_vram_mb=2000)).fits == "now"


def test_memory_that_cannot_be_read_is_the_nodes_to_judge() -> None:
    node = a_node("a")
    assert node.health is not None
    blind = [replace_free(device) for device in node.health.devices]
    unread = replace(node, health=type(node.health)(1.0, blind))

    found = best(a_fleet(unread), incoming(mb=500))

    assert (found.fits, found.free_mb, found.why) == ("now", None, "500 MB (measured) of ? MB free")


def replace_free(device: Any) -> Any:
    return type(device)(device.index, device.name, "ready")


def test_devices_that_are_not_ready_do_not_count() -> None:
    node = a_node("a", [100, 100])
    assert node.health is not None
    poisoned = type(node.health.devices[1])(1, "cuda:1", "poisoned", vram_free_mb=100)
    half = replace(node, health=type(node.health)(1.0, [node.health.devices[0], poisoned]))

    found = best(a_fleet(half), incoming(mb=10, min_devices=2))

    assert (found.fits, found.why) == ("no", "1 devices are ready, it needs 2")


@pytest.mark.parametrize("state", ["starting", "restarting"])
def test_devices_that_are_about_to_be_ready_are_waited_for(state: Any) -> None:
    node = a_node("a", [100])
    assert node.health is not None
    coming = type(node.health.devices[0])(0, "cuda:0", state)

    found = best(a_fleet(replace(node, health=type(node.health)(1.0, [coming]))), incoming(mb=10))

    assert (found.fits, found.why) == ("after_waiting", "0 devices are ready, it needs 1")


def test_a_model_does_not_go_where_it_is_just_leaving() -> None:
    leaving = a_node("a", [100], {"m": [10]}, states={"m": "unloading"})

    assert best(a_fleet(leaving), incoming(mb=10)).fits == "after_waiting"


def test_nobody_who_could_ever_hold_it_is_404_without_retry_after() -> None:
    status, code, seconds, message = refused(
        a_fleet(a_node("a", [100]), a_node("b", [50])), incoming(mb=200)
    )

    assert (status, code, seconds) == (404, "model_not_found", None)
    assert message == (
        "no node can hold 'm': "
        "node a: each of 1 devices must hold 200 MB, and one has 100; "
        "node b: each of 1 devices must hold 200 MB, and one has 50"
    )


def test_a_feasible_node_that_is_down_is_503_with_retry_after() -> None:
    snapshot = a_fleet(down(a_node("a", [300])), a_node("b", [100]))

    status, code, seconds, message = refused(snapshot, incoming(mb=200))

    assert (status, code, seconds) == (503, "recovering", 3)
    assert "node a: it is down" in message


def test_a_node_that_an_operator_drains_takes_no_loads() -> None:
    drained = replace(a_node("a"), is_drained=True)

    assert "it is draining" in refused(a_fleet(drained), incoming(mb=1))[3]


def test_a_node_that_has_just_failed_it_is_not_asked_again() -> None:
    model = replace(incoming(mb=1), excluded=frozenset({"a"}))

    assert best(a_fleet(a_node("a", [900]), a_node("b", [50])), model).node.name == "b"


def test_full_of_what_stays_is_503_with_the_numbers() -> None:
    snapshot = a_fleet(a_node("a", [100], {"x": [90]}), pinned=[("a", "x")])
    model = incoming(mb=50)

    error = refusal(model, candidates(snapshot, model, RULES))

    assert (error.status, error.code, error.retry_after_seconds) == (503, "overloaded", 5)
    assert str(error).endswith("node a: 50 MB (measured) of 10 MB free; x stays (pinned)")
    assert error.extras["nodes"][0]["free_mb"] == 10


def test_what_the_node_would_not_have_at_all_is_refused_in_its_words() -> None:
    wrong = Unloadable("there is no such quant", kind="quant_not_found")
    model = replace(incoming(), needs={"a": Need(refusal=wrong)})

    assert refusal(model, candidates(a_fleet(a_node("a")), model, RULES)) is wrong


def test_without_neurons_nothing_can_be_loaded() -> None:
    engine = replace(a_node("a"), is_engine=True)

    assert "there is none that loads models" in refused(a_fleet(engine), incoming(mb=1))[3]


def test_a_node_that_was_asked_for_is_the_only_one_in_question() -> None:
    model = replace(incoming(mb=50), only="b")

    found = candidates(a_fleet(a_node("a"), a_node("b", [90])), model, RULES)

    assert (found[0].node.name, found[1].fits) == ("b", "never")


def test_a_dry_run_shows_the_arithmetic_of_every_node() -> None:
    model = incoming(mb=50)
    snapshot = a_fleet(a_node("a", [100], {"x": [90]}), a_node("b", [20]))

    view = view_of(model, candidates(snapshot, model, RULES))

    assert (view.chosen, view.fits, view.evicts, view.needs_mb) == (
        "a",
        "after_evicting",
        ("x",),
        50,
    )
    assert [(c.node, c.fits, c.free_mb, c.reclaimable_mb) for c in view.candidates] == [
        ("a", "after_evicting", 10, 90),
        ("b", "never", None, 0),
    ]


def test_where_only_the_least_fits_what_is_wanted_is_said_too() -> None:
    need = Need(300, "measured", 50, least_source="estimate")
    model = replace(incoming(), needs={"a": need})

    view = view_of(model, candidates(a_fleet(a_node("a", [100])), model, RULES))

    assert view.candidates[0].why == (
        "at least 50 MB (estimate), better 300 MB (measured), of 100 MB free"
    )
    assert (view.needs_mb, view.source) == (300, "measured")
    assert (view.least_mb, view.least_source) == (50, "estimate")


def test_a_cache_that_is_larger_than_the_device_never_fits() -> None:
    model = incoming(kv_cache_mb=101)

    found = candidates(a_fleet(a_node("a", [100])), model, RULES)

    assert (found[0].fits, found[0].why) == (
        "never",
        "each of 1 devices must hold 101 MB, and one has 100",
    )


def test_a_dry_run_of_what_cannot_be_shows_the_refusal() -> None:
    model = incoming(mb=50)

    view = view_of(model, candidates(a_fleet(a_node("a", [20])), model, RULES))

    assert view.chosen is None
    assert view.refusal is not None
    assert (view.refusal["status"], view.refusal["code"]) == (404, "model_not_found")


def test_a_model_that_has_just_been_loaded_has_its_dwell() -> None:
    rules = Rules(min_dwell_seconds=10.0)
    node = a_node("a", [100], {"x": [90]})

    young = best(a_fleet(node, loaded={("a", "x"): NOW - 9}), incoming(mb=50), rules)
    old = best(a_fleet(node, loaded={("a", "x"): NOW - 11}), incoming(mb=50), rules)

    assert (young.fits, old.fits) == ("after_waiting", "after_evicting")


def test_a_load_that_nobody_has_measured_is_waited_for() -> None:
    node = a_node("a", [100], {"x": [0]}, states={"x": "loading"}, filling={0: 90})

    assert best(a_fleet(node), incoming(mb=50)).fits == "after_waiting"


def test_a_load_that_has_just_ended_is_not_counted_twice() -> None:
    node = a_node("a", [100], {"n": [60]})
    claim = Claim(("a", "n"), 100, "loading", {0: 60}, accounted_mb={0: 100})

    assert candidates(a_fleet(node), incoming(mb=40), RULES, [claim])[0].fits == "now"
