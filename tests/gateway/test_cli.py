"""The command ``cortex``, as people type it."""

import asyncio
import os
import pty
import signal
import socket
import sys
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from cortex.gateway import cli, operator_cli
from cortex.gateway.app import Gateway
from cortex.ipc.version import BUILD
from fakes import FakeNeuron, gateway_config
from typed import cortex, started, typed


def test_it_tells_its_version() -> None:
    assert cortex("--version")[:2] == (0, f"cortex {BUILD.package_version}\n")


def test_without_a_command_it_teaches() -> None:
    _, out, err = cortex()

    for command in ("up", "serve", "status", "chat"):
        assert f"cortex {command}" in out + err


COMMANDS = ["up", "serve", "status", "chat", *(verb.__name__ for verb in operator_cli.COMMANDS)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(cli.app, [command, "--help"])

    assert done.exit_code == 0
    assert f"Usage: cortex {command}" in done.stdout


def test_a_wrong_configuration_is_one_sentence_and_2(tmp_path: Path) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text('[gateway]\nlistn = "x"\n', encoding="utf-8")

    status, _, err = cortex("serve", "--config", str(path))

    assert (status, err) == (
        2,
        f"cortex: {path}:2: gateway.listn: unknown option; did you mean listen?\n",
    )


def test_a_taken_port_is_one_sentence_and_1(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        neuron = {"CORTEX_NEURONS__0__NAME": "a", "CORTEX_NEURONS__0__ENDPOINT": "http://a:1"}

        status, _, err = cortex("serve", CORTEX_GATEWAY__LISTEN=address, **neuron)

    assert status == 1
    assert err.splitlines()[-1] == f"cortex: cannot listen on {address}: address already in use"
    assert "Traceback" not in err


def test_serve_without_a_file_says_what_to_do() -> None:
    _, _, err = cortex("serve")

    assert "/etc/cortex/cortex.toml does not exist; write it" in err
    assert "--config" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--endpoint", "foo"], "--endpoint 'foo': expected http://HOST:PORT, without a path"),
        (["--api-key", "bad\nkey"], "--api-key: expected printable ASCII characters only"),
    ],
    ids=["endpoint", "key"],
)
@pytest.mark.parametrize("command", [["status"], ["chat", "hi"]], ids=lambda c: c[0])
def test_a_wrong_option_is_one_sentence_and_2(
    command: list[str], options: list[str], words: str
) -> None:
    status, _, err = cortex(*command, *options)

    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"cortex: {words}")


def test_every_command_is_described_in_one_line() -> None:
    _, out, _ = cortex("--help", COLUMNS="80")

    assert "..." not in out.partition("Commands:")[2]


async def test_an_interrupt_during_the_imports_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\ninput()\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cortex.gateway", "chat"),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()

    assert (process.returncode, err) == (-signal.SIGINT, b"")  # 130 to a shell


def test_up_refuses_an_address_in_words() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    status, _, err = cortex("up", "--listen", "nonsense", "--neuron-listen", f"127.0.0.1:{port}")

    assert (status, "Traceback" in err) == (2, False)
    assert "nonsense" in err


@pytest.mark.parametrize("command", [["status"], ["chat", "hi"]], ids=lambda c: c[0])
def test_a_gateway_that_is_not_there_is_one_sentence_and_1(command: list[str]) -> None:
    status, _, err = cortex(*command, "--endpoint", "http://127.0.0.1:9")

    assert status == 1
    assert err.startswith("cortex: no gateway answers at http://127.0.0.1:9")
    assert "Traceback" not in err


async def test_status_shows_the_fleet(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, out, _ = await typed(gateway, "status")

    assert (status, "ok: 1 of 1 nodes up" in out) == (0, True)


async def test_status_shows_json(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        _, out, _ = await typed(gateway, "status", "--json")

    assert orjson.loads(out)["nodes"][0]["name"] == "a"


async def test_chat_answers_one_question(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, out, _ = await typed(gateway, "chat", "--model", "qwen3-8b", "hi")

    assert (status, out) == (0, "Hello world\n")


async def test_chat_without_a_question_is_a_conversation(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, out, _ = await typed(gateway, "chat", said="hi\n\nand you?\n")

    assert (status, out) == (0, "Hello world\nHello world\n")
    assert [turn["content"] for turn in neuron.received[1].body["messages"]] == [
        "hi",
        "Hello world",
        "and you?",
    ]


async def test_an_interrupted_answer_is_no_traceback(neuron: FakeNeuron) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        process = await started(gateway, "chat", "hi")
        await neuron.answering.wait()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()

    assert (process.returncode, err) == (130, b"")


async def test_an_interrupted_answer_does_not_end_a_conversation(neuron: FakeNeuron) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        process = await started(gateway, "chat")
        assert process.stdin is not None
        process.stdin.write(b"hi\n")
        await neuron.answering.wait()
        process.send_signal(signal.SIGINT)
        await neuron.cancelled.wait()
        neuron.may_finish.set()
        out, err = await process.communicate(b"again\n")

    assert (process.returncode, b"(interrupted)" in err) == (0, True)
    assert out.endswith(b"Hello world\n")
    assert len(neuron.received[-1].body["messages"]) == 1


async def test_a_refusal_in_a_chat_is_one_sentence(neuron: FakeNeuron) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        status, _, err = await typed(gateway, "chat", "--model", "nobody-has-it", "hi")

    assert (status, err.startswith("cortex: nobody serves the model 'nobody-has-it'")) == (1, True)


async def test_whoever_did_not_choose_is_told_which_model_answers() -> None:
    async with FakeNeuron(["one", "two"]) as neuron, Gateway(gateway_config(neuron)) as gateway:
        _, out, err = await typed(gateway, "chat", "hi")
        _, _, chosen = await typed(gateway, "chat", "--model", "two", "hi")

    assert (out, err, chosen) == ("Hello world\n", "one answers; --model asks another one.\n", "")


async def test_a_conversation_on_a_terminal_has_prompts(neuron: FakeNeuron) -> None:
    ours, theirs = pty.openpty()
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cortex.gateway", "chat", "--endpoint", gateway.url),
            stdin=theirs,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        os.close(theirs)
        os.write(ours, b"hi\n\x04")
        out, _ = await process.communicate()
    os.close(ours)

    assert (process.returncode, out) == (0, b"> Hello world\n> \n")
