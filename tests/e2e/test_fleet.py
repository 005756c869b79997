"""Four real neurons with little memory, a real gateway: nothing is lost, and nothing is a lie."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet import Fleet
from stack import until

BIG = "kv_cache_mb = 150"
"""One fits on a device, two do not."""
MODELS = {
    "red": BIG,
    "green": BIG,
    "blue": BIG,
    "left": f'{BIG}\npinned_on = ["d"]\nresidency_priority = 100',
    "right": f'{BIG}\npinned_on = ["d"]\nresidency_priority = 100',
}
CROWD = 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One fleet for all: what a test leaves loaded, the next one finds."""
    with Fleet(tmp_path_factory.mktemp("fleet"), MODELS) as running:
        yield running


@pytest.fixture(autouse=True)
def _whole_again(fleet: Fleet) -> Iterator[None]:
    yield
    for neuron in fleet.neurons.values():
        neuron.heal()
        if neuron.process.poll() is not None:
            neuron.start()
    until(lambda: fleet.get("/health")["nodes"]["healthy"] == 4, "the fleet to be whole")
    fleet.check_no_lie()


def test_the_catalogue_lists_what_nobody_has_loaded(fleet: Fleet) -> None:
    listed = fleet.listed()

    assert set(listed) >= {*MODELS, "claude-tiny"}
    assert not any(listed.values())


def test_a_crowd_of_first_requests_makes_one_load_of_each_model(fleet: Fleet) -> None:
    wanted = [model for model in ("red", "green", "blue") for _ in range(CROWD)]

    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(fleet.chat, wanted))

    assert {answer.status for answer in answers} == {200}
    loads = sorted(load for neuron in fleet.neurons.values() for load in neuron.loads())
    assert loads == sorted(fleet.sources[model] for model in ("red", "green", "blue"))
    assert {frozenset(nodes) for nodes in fleet.truth().values() if nodes} <= {
        frozenset(name) for name in "abcd"
    }


def test_two_models_that_fit_one_at_a_time_take_turns(fleet: Fleet) -> None:
    for model in ("left", "right", "left", "right"):
        answer = fleet.chat(model)

        assert answer.status == 200, answer.data
        assert answer.headers["x-cortex-node"] == "d"
        assert fleet.truth()[model] == {"d"}
    assert "cortex_evictions_total{" in fleet.metrics()


def test_a_crowd_that_wants_both_is_served_without_thrashing(fleet: Fleet) -> None:
    before = len(fleet.neurons["d"].loads())

    with ThreadPoolExecutor(CROWD) as pool:
        answers = list(pool.map(fleet.chat, ["left", "right"] * (CROWD // 2)))

    assert {answer.status for answer in answers} == {200}
    assert len(fleet.neurons["d"].loads()) - before <= 4


def test_a_node_that_is_cut_off_is_replaced_and_comes_back(fleet: Fleet) -> None:
    assert fleet.chat("red").status == 200
    [home] = fleet.truth()["red"]

    fleet.neurons[home].cut_off()
    until(lambda: home not in fleet.listed()["red"], "the lost node to leave the list")
    elsewhere = fleet.chat("red")
    fleet.neurons[home].heal()

    assert elsewhere.status == 200, elsewhere.data
    assert elsewhere.headers["x-cortex-node"] != home
    until(lambda: home in fleet.listed()["red"], "the healed node to be back")


def test_a_node_killed_in_mid_stream_ends_the_stream_with_an_error(fleet: Fleet) -> None:
    assert fleet.chat("green").status == 200
    stream = fleet.stream("green", 240)
    lines = [next(stream) for _ in range(3)]
    [node] = fleet.truth()["green"]

    fleet.neurons[node].kill()
    lines += list(stream)

    assert '"error"' in lines[-1]
    assert "data: [DONE]" not in lines
    assert fleet.chat("green").status == 200


def test_a_gateway_that_is_restarted_finds_everything_as_it_was(fleet: Fleet) -> None:
    assert fleet.chat("blue").status == 200
    assert fleet.post("/fleet/models/pin", {"model": "blue"}).status == 200
    before = {name: len(neuron.loads()) for name, neuron in fleet.neurons.items()}
    used = fleet.get("/fleet/usage")["usage"]

    fleet.stop_gateway()
    fleet.start_gateway()

    assert fleet.chat("blue").status == 200
    assert {name: len(neuron.loads()) for name, neuron in fleet.neurons.items()} == before
    assert "blue" in {
        m["id"] for n in fleet.get("/fleet")["nodes"] for m in n["models"] if m["pinned"]
    }
    requests = sum(row["requests"] for row in fleet.get("/fleet/usage")["usage"])
    assert requests == sum(row["requests"] for row in used) + 1


def test_a_whole_fleet_that_is_cut_off_answers_in_words_and_comes_back(fleet: Fleet) -> None:
    for neuron in fleet.neurons.values():
        neuron.cut_off()
    until(lambda: fleet.get("/health")["nodes"]["healthy"] == 0, "the fleet to be gone")

    answer = fleet.chat("red")

    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
