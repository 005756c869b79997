"""Who has to go, and who never does."""

from collections.abc import Mapping

import pytest

from cortex.gateway.catalogue import Profile
from cortex.gateway.eviction import Hold, Resident, Rules, Strategy, residents, victims
from memory_fleet import NOW, a_fleet, a_node

IMAGE, MID, FLAGSHIP = 50, 100, 200
CLASSES = {"image": IMAGE, "mid": MID, "flagship": FLAGSHIP}


def a_resident(name: str, mb: int, used: float = 0.0, residency_class: int = 100) -> Resident:
    return Resident(("a", name), residency_class, {0: mb}, used, None)


def go(held: list[Resident], missing: Mapping[int, int], strategy: Strategy = "lru") -> list[str]:
    chosen = victims(held, missing, strategy)
    assert chosen is not None
    return [resident.place[1] for resident in chosen]


def hold_of(resident: str, incoming_class: int, rules: Rules) -> Hold | None:
    node = a_node("a", [100], {resident: [50]})
    return residents(a_fleet(node), node, incoming_class, rules)[0].hold


def test_the_least_recently_used_goes() -> None:
    assert go([a_resident("new", 50, 9.0), a_resident("old", 50, 1.0)], {0: 40}) == ["old"]


def test_one_that_was_never_used_goes_first() -> None:
    never = a_resident("never", 50, float("-inf"))

    assert go([a_resident("used", 50, 1.0), never], {0: 40}) == ["never"]


def test_no_more_go_than_are_needed() -> None:
    held = [a_resident("tiny", 10, 1.0), a_resident("large", 50, 2.0), a_resident("new", 50, 3.0)]

    assert go(held, {0: 45}) == ["large"]


def test_as_many_go_as_are_needed() -> None:
    held = [a_resident(name, 30, used) for used, name in enumerate("cab")]

    assert go(held, {0: 55}) == ["c", "a"]


def test_where_all_of_them_do_not_suffice_nobody_goes() -> None:
    assert victims([a_resident("x", 30)], {0: 40}, "lru") is None


def test_models_on_other_devices_stay() -> None:
    elsewhere = Resident(("a", "elsewhere"), 100, {1: 90}, 0.0, None)

    assert go([elsewhere, a_resident("here", 50, 5.0)], {0: 40}) == ["here"]


def test_one_model_on_two_devices_frees_both() -> None:
    both = Resident(("a", "both"), 100, {0: 50, 1: 50}, 0.0, None)

    assert go([both], {0: 40, 1: 40}) == ["both"]


def test_priority_lets_the_lowest_class_go_however_recently_it_was_used() -> None:
    held = [a_resident("old", 50, 1.0, MID), a_resident("low", 50, 9.0, IMAGE)]

    assert (go(held, {0: 40}, "priority"), go(held, {0: 40}, "lru")) == (["low"], ["old"])


def test_what_is_closing_already_goes_first() -> None:
    closing = Resident(("a", "closing"), 100, {0: 50}, 9.0, None, is_closing=True)

    assert go([a_resident("old", 50, 1.0), closing], {0: 40}) == ["closing"]


@pytest.mark.parametrize(
    ("comes", "stays", "hold"),
    [
        ("image", "mid", "class"),
        ("image", "flagship", "class"),
        ("mid", "image", None),
        ("flagship", "mid", None),
        ("mid", "mid", None),
        ("unlisted", "mid", None),
        ("mid", "unlisted", None),
        ("image", "unlisted", "class"),
    ],
)
def test_a_model_displaces_its_own_class_and_lower_ones(
    comes: str, stays: str, hold: Hold | None
) -> None:
    rules = Rules(classes=CLASSES)

    assert hold_of(stays, rules.class_of(comes), rules) == hold


def test_the_least_recently_used_is_sought_among_those_that_may_go() -> None:
    node = a_node("a", [100], {"flagship": [50], "image": [50]})
    snapshot = a_fleet(node, used={("a", "flagship"): 1.0, ("a", "image"): 9.0})

    held = residents(snapshot, node, MID, Rules(classes=CLASSES))
    may_go = [resident for resident in held if resident.hold is None]

    assert go(may_go, {0: 40}) == ["image"]


def test_a_model_that_is_bound_to_nodes_ranks_higher_unless_it_says_otherwise() -> None:
    bound, says = (
        Profile("x", pinned_on=("a",)),
        Profile("y", pinned_on=("a",), residency_priority=7),
    )

    assert (bound.residency_class, says.residency_class, Profile("z").residency_class) == (
        1000,
        7,
        100,
    )


def test_each_thing_that_holds_a_model_is_named() -> None:
    node = a_node(
        "a",
        [100],
        {name: [10] for name in ("pinned", "busy", "young", "late", "moving", "taken", "idle")},
        busy=["busy"],
        states={"moving": "unloading"},
    )
    snapshot = a_fleet(node, loaded={("a", "young"): NOW - 1}, pinned=[("a", "pinned")])
    rules = Rules(min_dwell_seconds=5.0, arriving={("a", "late"): 1})

    held = residents(snapshot, node, 100, rules, frozenset({("a", "taken")}))

    assert {resident.place[1]: resident.hold for resident in held} == {
        "pinned": "pinned",
        "busy": "busy",
        "young": "dwell",
        "late": "busy",
        "moving": "moving",
        "taken": "moving",
        "idle": None,
    }


def test_a_model_that_failed_holds_nothing() -> None:
    node = a_node("a", [100], {"x": [10]}, states={"x": "failed"})

    assert residents(a_fleet(node), node, 100, Rules()) == []


def test_requests_of_ours_since_the_poll_keep_a_model() -> None:
    node = a_node("a", [100], {"x": [10]})
    snapshot = a_fleet(node)
    sent = type(snapshot)(snapshot.nodes, {("a", "x"): 1}, now=NOW)

    assert residents(sent, node, 100, Rules())[0].hold == "busy"
