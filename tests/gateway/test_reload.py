"""What a running gateway does when its files have changed."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import BUILT_IN, Catalogue, Profile
from cortex.gateway.config import (
    Engine,
    Entitlements,
    Eviction,
    GatewayConfig,
    Key,
    Listening,
    Neuron,
    State,
    Timeouts,
)
from cortex.gateway.reload import changes, following, waiting_for_a_restart
from cortex.gateway.written import Written
from cortex.ipc.node_api import EMBEDDED_MODEL
from fakes import FakeNeuron, gateway_config, until

MODEL = "qwen3-8b"
CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}

Log = list[dict[str, Any]]


async def reload(gateway: Gateway, config: GatewayConfig, catalogue: Catalogue = BUILT_IN) -> None:
    """Have *gateway* reload what now says *config* and *catalogue*."""
    await gateway.reload(lambda: Written(config, catalogue)).again()


async def ids(session: aiohttp.ClientSession, gateway: Gateway) -> list[str]:
    """Return what is listed."""
    async with session.get(gateway.url + "/v1/models") as response:
        return [entry["id"] for entry in (await response.json())["data"]]


async def status_of(
    session: aiohttp.ClientSession, gateway: Gateway, key: str = "", path: str = "/v1/models"
) -> int:
    """Return how a GET of *path* is answered."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with session.get(gateway.url + path, headers=headers) as response:
        return response.status


def said(logged: Log, event: str) -> list[dict[str, Any]]:
    """Return the lines of *event*, without what all lines have."""
    lines = [entry for entry in logged if entry["event"] == event]
    return [{k: v for k, v in line.items() if k not in ("event", "log_level")} for line in lines]


class Files:
    """A ``cortex.toml`` in front of one neuron, and the ``models.toml`` beside it."""

    def __init__(self, folder: Path, neuron: FakeNeuron) -> None:
        self.config = folder / "cortex.toml"
        self.models = folder / "models.toml"
        self.plain = (
            '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
            f'[[neurons]]\nname = "a"\nendpoint = "{neuron.url}"\n'
        )
        self.config.write_text(self.plain)

    def read(self) -> Written:
        """Read both."""
        return Written.read(self.config)


@pytest.fixture
def files(tmp_path: Path, neuron: FakeNeuron) -> Files:
    return Files(tmp_path, neuron)


async def serve_and_reload(files: Files, **texts: str) -> Gateway:
    """Return a gateway of *files*, stopped again, that has reloaded once they said *texts*."""
    written = await asyncio.to_thread(files.read)
    async with Gateway(written.config, written.catalogue) as gateway:
        for name, text in texts.items():
            await asyncio.to_thread(getattr(files, name).write_text, text)
        await gateway.reload(files.read).again()
    return gateway


async def test_a_model_that_was_added_is_offered(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    config = gateway_config(neuron)

    async with Gateway(config) as gateway:
        await reload(gateway, config, Catalogue({"new": Profile("new")}, {"nick": "new"}))

        assert await ids(session, gateway) == ["new", "nick", MODEL]


async def test_a_bug_in_what_reads_the_files_ends_nothing(
    session: aiohttp.ClientSession, neuron: FakeNeuron, logged: Log
) -> None:
    def read() -> Written:
        raise ValueError("nobody foresaw this")

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.reload(read).again()

        assert MODEL in await ids(session, gateway)
        assert said(logged, "configuration not reloaded, what it was stays")[0]["exc_info"]


async def test_both_files_are_read_again(files: Files, logged: Log) -> None:
    gateway = await serve_and_reload(
        files,
        config=files.plain + "[timeouts]\npoll_seconds = 9\n",
        models='[[models]]\nid = "m"\n',
    )

    assert gateway.written.timeouts.poll_seconds == 9.0
    assert said(logged, "configuration reloaded") == [
        {"models_added": ["m"], "options": ["timeouts.poll_seconds"]}
    ]


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ({"config": "[timeouts]\npoll_seconds = 0\n"}, "cortex.toml:2: timeouts.poll_seconds: "),
        ({"config": "gateway = 3 4\n"}, "cortex.toml:1: not TOML"),
        ({"models": '[[models]]\nid = "m"\nvram = 3\n'}, "models.toml:3: models[0].vram: unknown"),
    ],
)
async def test_a_broken_file_changes_nothing_and_its_line_is_said(
    files: Files, logged: Log, texts: dict[str, str], why: str
) -> None:
    before = await asyncio.to_thread(files.read)

    gateway = await serve_and_reload(files, **texts)

    assert gateway.written == before
    [line] = said(logged, "configuration not reloaded, what it was stays")
    assert why in line["why"]


async def test_one_broken_file_keeps_the_other_out(files: Files) -> None:
    before = await asyncio.to_thread(files.read)
    poll = files.plain + "[timeouts]\npoll_seconds = 9\n"

    gateway = await serve_and_reload(files, config=poll, models="models = 3\n")

    assert gateway.written == before


async def test_the_next_reload_works_again(files: Files) -> None:
    written = await asyncio.to_thread(files.read)
    async with Gateway(written.config, written.catalogue) as gateway:
        again = gateway.reload(files.read).again
        await asyncio.to_thread(files.models.write_text, "[[")
        await again()
        await asyncio.to_thread(files.models.write_text, '[[models]]\nid = "m"\n')
        await again()

        assert "m" in gateway.written.catalogue.profiles


async def test_keys_count_with_the_next_request(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    old, new = Key("sk-old-one", "old"), Key("sk-new-one", "new")
    closed = partial(Entitlements, require_auth=True)

    async with Gateway(gateway_config(neuron, entitlements=closed(keys=(old,)))) as gateway:
        before = [await status_of(session, gateway, key.key) for key in (old, new)]
        await reload(gateway, gateway_config(neuron, entitlements=closed(keys=(new,))))
        after = [await status_of(session, gateway, key.key) for key in (old, new)]

    assert (before, after) == ([200, 401], [401, 200])


async def test_keys_may_become_due(session: aiohttp.ClientSession, neuron: FakeNeuron) -> None:
    keys = (Key("sk-old-one", "old"),)

    async with Gateway(gateway_config(neuron)) as gateway:
        before = await status_of(session, gateway)
        await reload(
            gateway, gateway_config(neuron, entitlements=Entitlements(require_auth=True, keys=keys))
        )
        after = await status_of(session, gateway)

    assert (before, after) == (200, 401)


async def test_a_node_that_was_added_serves(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron)) as gateway:
        await reload(gateway, gateway_config(neuron, b))
        await gateway.poller.first_round()

        assert await ids(session, gateway) == ["m", MODEL, EMBEDDED_MODEL]
        assert [node.name for node in gateway.fleet.snapshot().nodes] == ["a", "b"]


async def test_what_is_known_of_the_others_is_kept(neuron: FakeNeuron) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron, b)) as gateway:
        await gateway.poller.first_round()
        neuron.may_poll.clear()
        await reload(gateway, gateway_config(neuron))

        assert gateway.fleet.node("a").takes_requests


async def test_a_stream_of_a_node_that_was_removed_goes_on_to_its_end(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    neuron.may_finish.clear()
    async with (
        FakeNeuron(["m"], "b") as b,
        Gateway(gateway_config(neuron, b)) as gateway,
        session.post(gateway.url + CHAT, json=BODY | {"stream": True}) as response,
    ):
        await response.content.readuntil(b"Hello")
        await reload(gateway, gateway_config(b))
        listed = await ids(session, gateway)
        neuron.may_finish.set()
        rest = await response.text()

    assert MODEL not in listed
    assert rest.endswith("data: [DONE]\n\n")


async def test_a_removed_node_is_polled_no_more_and_its_gauges_vanish(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron, b)) as gateway:
        await gateway.poller.first_round()
        await reload(gateway, gateway_config(b))
        polls = neuron.polls
        await gateway.poller.refresh("b")
        await gateway.poller.refresh("b")
        async with session.get(gateway.metrics_url + "/metrics") as response:
            gauges = await response.text()

    assert neuron.polls == polls
    assert 'cortex_node_healthy{node="b"}' in gauges
    assert 'node="a"' not in gauges


async def test_nobody_waits_for_a_poll_of_a_node_that_was_removed(neuron: FakeNeuron) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron, b)) as gateway:
        await gateway.poller.first_round()
        neuron.may_poll.clear()
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            waiting = group.create_task(gateway.poller.refresh("a"))
            await asyncio.sleep(0)
            await reload(gateway, gateway_config(b))
        await gateway.poller.refresh("a")
        gateway.poller.doubt("a")

        assert waiting.done()
        assert gateway.fleet.node("a").error == "no longer configured"


async def test_a_poll_that_was_under_way_does_not_bring_a_node_back(neuron: FakeNeuron) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron, b)) as gateway:
        await gateway.poller.first_round()
        known = gateway.fleet.node("a")
        await reload(gateway, gateway_config(b))
        gateway.fleet.put(known)

        assert [node.name for node in gateway.fleet.snapshot().nodes] == ["b"]


async def test_a_node_that_was_removed_is_asked_nothing_any_more(neuron: FakeNeuron) -> None:
    async with FakeNeuron(["m"], "b") as b, Gateway(gateway_config(neuron, b)) as gateway:
        await gateway.poller.first_round()
        known = gateway.fleet.node("a")
        await reload(gateway, gateway_config(b))

        with pytest.raises(Exception, match="node a is no longer configured"):
            await gateway.services().client.control(known, "GET /health")


async def test_a_node_at_another_address_is_another_node(
    session: aiohttp.ClientSession, neuron: FakeNeuron
) -> None:
    async with FakeNeuron(["m"], "a") as moved, Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        await reload(gateway, gateway_config(moved))
        await until(lambda: gateway.fleet.node("a").is_healthy)

        assert await ids(session, gateway) == ["m", EMBEDDED_MODEL]
        assert gateway.fleet.node("a").url == moved.url


async def test_a_new_node_whose_key_cannot_be_read_keeps_everything_as_it_was(
    neuron: FakeNeuron, tmp_path: Path, logged: Log
) -> None:
    config = gateway_config(neuron)
    new = Neuron("b", "http://127.0.0.1:1", key_file=str(tmp_path / "none"))

    async with Gateway(config) as gateway:
        await reload(gateway, msgspec.structs.replace(config, neurons=(*config.neurons, new)))

        assert gateway.written.config == config
    [line] = said(logged, "configuration not reloaded, what it was stays")
    assert line["why"].startswith("neuron b: cannot read ")


async def test_what_needs_a_restart_is_said_at_every_reload(
    neuron: FakeNeuron, logged: Log
) -> None:
    config = gateway_config(neuron)
    new = msgspec.structs.replace(
        config, gateway=Listening("127.0.0.1:1", "127.0.0.1:0"), state=State("/elsewhere")
    )

    async with Gateway(config) as gateway:
        await reload(gateway, new)
        await reload(gateway, new)

    waiting = {"options": ["gateway.listen", "state.directory"]}
    assert said(logged, "these options need a restart") == [waiting, waiting]
    assert said(logged, "configuration reloaded") == [{}, {}]


@pytest.mark.parametrize(
    ("before", "after", "different"),
    [
        ({}, {}, {}),
        ({}, {"neurons": (Neuron("a", "http://a:1"),)}, {"nodes_added": ["a"]}),
        ({"engines": (Engine("e", "http://a:1"),)}, {}, {"nodes_removed": ["e"]}),
        (
            {"neurons": (Neuron("a", "http://a:1"),)},
            {"neurons": (Neuron("a", "http://a:2"),)},
            {"nodes_changed": ["a"]},
        ),
        (
            {"entitlements": Entitlements(keys=(Key("sk-one-one", "x"), Key("sk-two-two", "y")))},
            {"entitlements": Entitlements(keys=(Key("sk-one-new", "x"), Key("sk-two-two", "z")))},
            {"keys_added": ["z"], "keys_removed": ["y"], "keys_changed": ["x"]},
        ),
        ({}, {"eviction": Eviction("priority")}, {"options": ["eviction.strategy"]}),
        ({}, {"models_config": "mine.toml"}, {"options": ["models_config"]}),
        (
            {"timeouts": Timeouts(poll_seconds=1.0, drain_seconds=1.0)},
            {},
            {"options": ["timeouts.drain_seconds", "timeouts.poll_seconds"]},
        ),
    ],
)
def test_what_has_changed_is_told_by_names_and_without_secrets(
    before: dict[str, Any], after: dict[str, Any], different: dict[str, list[str]]
) -> None:
    old, new = (Written(GatewayConfig(**options), BUILT_IN) for options in (before, after))

    assert changes(old, new) == different


def test_what_has_changed_in_the_catalogue_is_told_by_names() -> None:
    old = Catalogue({"a": Profile("a"), "b": Profile("b")}, {"x": "a", "y": "a"})
    new = Catalogue({"b": Profile("b", quant="q8_0"), "c": Profile("c")}, {"y": "b", "z": "b"})
    config = GatewayConfig()

    assert changes(Written(config, old), Written(config, new)) == {
        "models_added": ["c"],
        "models_removed": ["a"],
        "models_changed": ["b"],
        "aliases_added": ["z"],
        "aliases_removed": ["x"],
        "aliases_changed": ["y"],
    }


def test_what_cannot_change_stays_as_it_runs() -> None:
    running = GatewayConfig(gateway=Listening("127.0.0.1:1"), state=State("/a"))
    written = GatewayConfig(state=State("/b"), eviction=Eviction("priority"))

    assert waiting_for_a_restart(running, written) == ["gateway.listen", "state.directory"]
    assert following(running, written) == msgspec.structs.replace(
        running, eviction=Eviction("priority")
    )
