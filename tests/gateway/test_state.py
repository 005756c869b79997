"""The state file: what it keeps, whose it is, and what goes wrong with files."""

import asyncio
import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.config import GatewayConfig, State
from cortex.gateway.state import FILE, MIGRATIONS, StateFile, state_path
from cortex.ipc.settings import ConfigError
from fakes import FakeNeuron, gateway_config

Work = Callable[[sqlite3.Connection], object]


def drain(node: str) -> Work:
    return lambda connection: connection.execute("INSERT INTO drained VALUES (?)", (node,))


def drained(connection: sqlite3.Connection) -> list[str]:
    return [node for (node,) in connection.execute("SELECT node FROM drained ORDER BY node")]


async def kept(path: Path | None) -> list[str]:
    async with StateFile(path) as state:
        return await state.do(drained)


def kept_aside(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.glob("*damaged*")}


async def test_a_file_and_its_directories_are_made_for_nobody_else_to_read(tmp_path: Path) -> None:
    path = tmp_path / "var" / "cortex" / FILE

    async with StateFile(path) as state:
        assert await state.do(drained) == []
        modes = [entry.stat().st_mode & 0o777 for entry in (path.parent, path)]

    assert modes == [0o700, 0o600]


async def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    async with StateFile(tmp_path / FILE) as state:
        await state.do(drain("a"))

    assert await kept(tmp_path / FILE) == ["a"]


async def test_everything_queued_is_written_before_the_end(tmp_path: Path) -> None:
    async with StateFile(tmp_path / FILE) as state:
        for number in range(100):
            state.later(drain(f"node-{number:02}"))

    assert len(await kept(tmp_path / FILE)) == 100


async def test_changes_and_questions_are_done_in_the_order_they_are_asked_in() -> None:
    async with StateFile(None) as state:
        state.later(drain("a"))
        seen = await state.do(drained)

    assert seen == ["a"]


async def test_what_a_killed_daemon_had_written_is_there(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys, pathlib\n"
        "from cortex.gateway.state import StateFile\n"
        "async def main():\n"
        "    async with StateFile(pathlib.Path(sys.argv[1])) as state:\n"
        "        await state.do(lambda c: c.execute(\"INSERT INTO drained VALUES ('a')\"))\n"
        "        os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    died = await asyncio.create_subprocess_exec(sys.executable, "-c", script, tmp_path / FILE)
    assert await died.wait() == 9

    assert await kept(tmp_path / FILE) == ["a"]


async def test_without_a_path_everything_is_forgotten_at_the_end() -> None:
    async with StateFile(None) as state:
        await state.do(drain("a"))

    assert await kept(None) == []


async def test_a_failed_transaction_leaves_nothing_behind() -> None:
    def half(connection: sqlite3.Connection) -> None:
        drain("a")(connection)
        raise ZeroDivisionError

    async with StateFile(None) as state:
        with pytest.raises(ZeroDivisionError):
            await state.do(half)
        seen = await state.do(drained)

    assert seen == []


async def test_what_cannot_be_written_is_logged_and_harms_nobody(
    tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    async with StateFile(tmp_path / FILE) as state:
        state.later(lambda connection: connection.execute("INSERT INTO nowhere VALUES (1)"))
        state.later(lambda _: 1 // 0)
        state.later(drain("a"))
        seen = await state.do(drained)

    lines = [entry for entry in logged if entry["event"] == "state not written"]
    assert seen == ["a"]
    assert [line.get("why") for line in lines] == ["no such table: nowhere", None]
    assert lines[1]["exc_info"] is True


async def test_a_second_gateway_is_refused_in_words(tmp_path: Path) -> None:
    async with StateFile(tmp_path / FILE):
        with pytest.raises(ConfigError, match="belongs to another gateway that runs"):
            await kept(tmp_path / FILE)


async def test_a_gateway_whose_state_is_taken_does_not_start(
    neuron: FakeNeuron, tmp_path: Path
) -> None:
    config = gateway_config(neuron)

    async with Gateway(config, state=tmp_path / FILE):
        with pytest.raises(ConfigError, match="belongs to another gateway"):
            await Gateway(config, state=tmp_path / FILE).__aenter__()

    assert await kept(tmp_path / FILE) == []


async def test_a_second_daemon_ends_with_2_and_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "cortex.toml"
    file.write_text(
        '[gateway]\nlisten = "127.0.0.1:0"\nmetrics_listen = "127.0.0.1:0"\n'
        f'[state]\ndirectory = "{tmp_path}"\n'
        '[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:9"\n'
    )

    async with StateFile(tmp_path / FILE):
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex.gateway", "serve", "--config", str(file)),
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(30):
                _, said = await second.communicate()
        finally:
            with suppress(ProcessLookupError):
                second.kill()

    assert second.returncode == 2
    assert said.decode() == (f"cortex: {tmp_path / FILE} belongs to another gateway that runs\n")


@pytest.mark.parametrize(
    "garbage", [b"not a database" * 500, b"SQLite format 3\0" + b"\xff" * 8184]
)
async def test_a_damaged_file_is_kept_aside_and_begun_anew(
    tmp_path: Path, logged: list[dict[str, Any]], garbage: bytes
) -> None:
    path = tmp_path / FILE
    path.write_bytes(garbage)

    async with StateFile(path) as state:
        await state.do(drain("a"))

    (line,) = [entry for entry in logged if entry["event"].startswith("state was damaged")]
    assert kept_aside(tmp_path) == {line["kept"]: garbage}
    assert await kept(path) == ["a"]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_damage_behind_the_first_page_is_found_at_the_start(
    tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    path = tmp_path / FILE
    async with StateFile(path) as state:
        for number in range(2000):
            state.later(drain(f"node-{number:099}"))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size // 4))

    assert await kept(path) == []
    assert any(entry["event"].startswith("state was damaged") for entry in logged)


async def test_a_file_of_a_newer_version_is_refused_in_words_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE
    async with StateFile(path) as state:
        await state.do(lambda c: c.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}"))
    before = path.read_bytes()

    with pytest.raises(ConfigError, match="by a newer version of the gateway"):
        await kept(path)

    assert path.read_bytes() == before


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=rf"cannot keep state in {tmp_path}/file/cortex: Not a"):
        await kept(tmp_path / "file" / "cortex" / FILE)


async def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()

    with pytest.raises(ConfigError, match=rf"cannot keep state in {tmp_path}/{FILE}: unable to op"):
        await kept(tmp_path / FILE)


@pytest.mark.parametrize(
    ("configured", "environment", "expected"),
    [
        ("/srv/state", {"STATE_DIRECTORY": "/var/lib/cortex"}, "/srv/state/cortex.db"),
        (None, {"STATE_DIRECTORY": "/var/lib/cortex:/b"}, "/var/lib/cortex/cortex.db"),
        (None, {"XDG_STATE_HOME": "/var/u/s"}, "/var/u/s/cortex/cortex.db"),
        (None, {}, f"{Path.home()}/.local/state/cortex/cortex.db"),
    ],
)
def test_the_file_lies_where_the_operator_or_the_system_says(
    configured: str | None, environment: dict[str, str], expected: str
) -> None:
    config = GatewayConfig(state=State(configured))

    assert str(state_path(config, environment)) == expected
