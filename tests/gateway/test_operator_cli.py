"""The operators' commands, as people type them, against a gateway."""

import asyncio
import signal
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from cortex.gateway import cli, operator_cli, telling
from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Entitlements, Key
from cortex.gateway.telling import drain_and_tell, load_and_tell
from cortex.gateway.terminal import GatewayClient, LoadLines, Unreachable
from cortex.ipc.fleet_api import LoadModel
from fakes import FakeNeuron, gateway_config, until
from typed import cells, invoked, started

COLD = Catalogue({"m": Profile("m"), "n": Profile("n")}, {"nick": "m"})
VERBS: dict[str, list[str]] = {
    "models": [],
    "placement": ["m"],
    "load": ["m"],
    "unload": ["m"],
    "pin": ["m"],
    "unpin": ["m"],
    "drain": ["a"],
    "undrain": ["a"],
    "usage": [],
}


def as_typed(value: Any) -> str | None:
    """Return a test's name: the command line."""
    return " ".join(value) if isinstance(value, list) and value and str in map(type, value) else ""


@pytest.fixture(autouse=True)
def _looks_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "LOOK_SECONDS", 0.01)


def test_every_command_of_the_operators_is_tested_here() -> None:
    assert [command.__name__ for command in operator_cli.COMMANDS] == [*VERBS]


@pytest.mark.parametrize("verb", VERBS)
def test_a_gateway_that_is_not_there_is_one_sentence_and_1(verb: str) -> None:
    done = CliRunner().invoke(cli.app, [verb, *VERBS[verb], "--endpoint", "http://127.0.0.1:9"])

    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("cortex: no gateway answers at http://127.0.0.1:9")


@pytest.mark.parametrize("verb", VERBS)
async def test_every_command_has_its_answer_as_json(verb: str) -> None:
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a), COLD) as gateway:
        status, out, err = await invoked(gateway, verb, *VERBS[verb], "--json")

    assert (status, err) == (0, "")
    assert orjson.loads(out)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["models"], [["m", "yes", "a (loaded)", "4096"], ["n", "", "", ""]]),
        (["load", "m"], [["m", "a", "loaded"]]),
        (["load", "n"], [["n", "a", "loaded"]]),
        (["unload", "m"], [["m", "a", "unloaded"]]),
        (["unload", "m", "--node", "a", "--force"], [["m", "a", "unloaded"]]),
        (["pin", "m"], [["m", "a", "pinned"]]),
        (["pin", "n"], [["n", "a", "pinned"]]),
        (["drain", "a"], [["a", "draining", "0", "m"]]),
        (["drain", "a", "--wait"], [["a", "drained", "0", ""]]),
        (["undrain", "a"], [["a", "undrained"]]),
        (["usage", "--since", "2026-01-01"], []),
    ],
    ids=as_typed,
)
async def test_every_command_prints_a_table(arguments: list[str], rows: list[list[str]]) -> None:
    catalogue = Catalogue(COLD.profiles)
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a), catalogue) as gateway:
        status, out, _ = await invoked(gateway, *arguments)

    assert (status, cells(out)) == (0, rows)


async def test_a_pin_that_loads_nothing_says_so_and_is_taken_back() -> None:
    async with FakeNeuron(name="a") as a, Gateway(gateway_config(a), COLD) as gateway:
        _, pinned, _ = await invoked(gateway, "pin", "n")
        _, unpinned, _ = await invoked(gateway, "unpin", "n", "--node", "a")
        _, nothing, _ = await invoked(gateway, "unpin", "n", "--node", "a")

    assert pinned.splitlines()[-1] == "n is not loaded there: `cortex load` does that."
    assert cells(unpinned) == [["n", "a", "unpinned"]]
    assert nothing == "n was not pinned on a\n"


async def test_a_placement_is_told_with_its_arithmetic() -> None:
    catalogue = Catalogue({"n": Profile("n", vram_mb=950)})
    async with FakeNeuron(["m"], "a") as a:
        a.free_mb = 900
        async with Gateway(gateway_config(a), catalogue) as gateway:
            await gateway.poller.first_round()
            gateway.fleet.pinned.add(("a", "m"))
            status, out, _ = await invoked(gateway, "placement", "n")

    assert status == 0
    assert out.startswith("there is no room for 'n' now")
    assert out.endswith("a: 950 MB (profile) of 900 MB free; m stays (pinned)\n")


async def test_a_load_says_how_far_it_is() -> None:
    said: list[str] = []
    async with FakeNeuron(name="a") as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        asked = LoadModel("nick")
        client = GatewayClient(gateway.url, None)
        async with asyncio.TaskGroup() as group:
            done = group.create_task(
                load_and_tell(client, asked, LoadLines(said.append), wait=True)
            )
            await until(lambda: any("downloading 40 %" in line for line in said))
            a.may_load.set()

    assert (done.result().status, done.result().node) == ("loaded", "a")
    assert "loading m on a: downloading 40 %, 0 of 0 MB" in said


async def test_a_load_that_fails_is_one_sentence_and_1() -> None:
    async with FakeNeuron(name="a") as a, Gateway(gateway_config(a), COLD) as gateway:
        a.fails_load = "the disk is full"
        status, out, err = await invoked(gateway, "load", "m")

    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "cortex: 'm' could not be loaded on a: the disk is full"


async def test_a_load_need_not_be_waited_for() -> None:
    async with FakeNeuron(name="a") as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        status, out, _ = await invoked(gateway, "load", "m", "--node", "a", "--no-wait")

    assert (status, cells(out)) == (0, [["m", "a", "loading"]])


async def test_ctrl_c_stops_the_waiting_and_not_the_load() -> None:
    async with FakeNeuron(name="a") as a, Gateway(gateway_config(a), COLD) as gateway:
        a.may_load.clear()
        process = await started(gateway, "load", "m")
        assert process.stderr is not None
        await process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
        a.may_load.set()
        await until(lambda: gateway.fleet.node("a").status_of("m") == "loaded")

    assert (process.returncode, b"Traceback" in err) == (130, False)


async def test_a_drain_is_seen_to_its_end() -> None:
    said: list[str] = []
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a), COLD) as gateway:
        await gateway.poller.first_round()
        client = GatewayClient(gateway.url, None)
        async with asyncio.TaskGroup() as group:
            with gateway.fleet.holding("a", "m"):
                done = group.create_task(
                    drain_and_tell(client, "a", LoadLines(said.append), wait=True)
                )
                await until(lambda: bool(said))

    assert (done.result().status, done.result().drain.done) == ("drained", True)
    assert said[0] == "a: drained by an operator: 1 requests run, models left: m"


async def test_a_drain_that_somebody_takes_back_is_said() -> None:
    said: list[str] = []
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a), COLD) as gateway:
        await gateway.poller.first_round()

        def undrain(line: str) -> None:
            said.append(line)
            gateway.drains.undrain("a")

        client = GatewayClient(gateway.url, None)
        with gateway.fleet.holding("a", "m"), pytest.raises(Unreachable, match="undrained a"):
            await drain_and_tell(client, "a", LoadLines(undrain), wait=True)


def test_a_day_that_is_none_is_one_sentence_and_2() -> None:
    done = CliRunner().invoke(cli.app, ["usage", "--since", "yesterday"])

    assert (done.exit_code, done.stderr) == (
        2,
        "cortex: --since 'yesterday': expected a day, as YYYY-MM-DD\n",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["load", "stranger"], "'stranger' is not in the catalogue"),
        (["drain", "x"], "no node is called 'x'; there are: a"),
        (["drain", "a/../b"], "no node is called 'a/../b'; there are: a"),
        (["pin", "m", "--node", "x"], "no node is called 'x'; there are: a"),
        (["unload", "n"], "no node has 'n'"),
    ],
    ids=as_typed,
)
async def test_a_refusal_is_one_sentence_and_1(arguments: list[str], words: str) -> None:
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a), COLD) as gateway:
        status, out, err = await invoked(gateway, *arguments)

    assert (status, out, err) == (1, "", f"cortex: {words}\n")


async def test_what_takes_an_operator_s_key_says_so() -> None:
    keys = (Key("sk-of-a-guest", "guest"),)
    doors: dict[str, Any] = {"entitlements": Entitlements(require_auth=True, keys=keys)}
    async with FakeNeuron(["m"], "a") as a, Gateway(gateway_config(a, **doors), COLD) as gateway:
        status, _, err = await invoked(gateway, "unload", "m", "--api-key", "sk-of-a-guest")

    assert status == 1
    assert "that takes a key with operator = true" in err
