"""The wire contract of cortex.ipc.messages."""

import msgspec
import pytest

from cortex.ipc import codec, messages
from cortex.ipc.errors import ProtocolError

FOOTPRINT = messages.Footprint(weights_bytes=3, kv_bytes=2, workspace_bytes=1)

EVERY_COMMAND: list[messages.Command] = [
    messages.Ping(command_id=1),
    messages.LoadModel(command_id=1, model="m", path="/models/m.gguf", max_context_tokens=4096),
    messages.LoadModel(
        command_id=1,
        model="m",
        path="/models/m",
        quant="q4_0",
        quant_cache="/var/cache/quant",
        group="cuda:0+cuda:1",
    ),
    messages.UnloadModel(command_id=1, model="m"),
    messages.Generate(
        command_id=2,
        sequence_id=7,
        model="m",
        prompt_token_ids=[1, 2, 3],
        sampling=messages.SamplingParams(
            temperature=0.5,
            max_tokens=8,
            seed=2**63 - 1,
            stop_token_ids=(2, 0),
            logit_bias={7: -100.0},
            top_logprobs=5,
            reasoning_budget=messages.ReasoningBudget(
                max_tokens=64, start_token_ids=(), end_token_ids=(9, 10)
            ),
        ),
    ),
    messages.Embed(command_id=6, model="m", prompt_token_ids=[1, 2], pooling="mean"),
    messages.Cancel(command_id=3, sequence_id=7),
    messages.QueryMemory(command_id=4),
    messages.ClearPrefixCache(command_id=4, model="m"),
    messages.JoinGroup(command_id=8, group="g", rank=1, ranks=2, meeting="/run/meeting"),
    messages.CheckCollective(command_id=9, group="g"),
    messages.LeaveGroup(command_id=10, group="g"),
    messages.Shutdown(command_id=5),
]

HELLO = messages.Hello(
    protocol=messages.PROTOCOL_VERSION,
    device="cpu:0",
    pid=1,
    preloaded=True,
    server_threads=1,
    torch_version="2.13.0",
)

EVERY_EVENT: list[messages.Event] = [
    HELLO,
    messages.Pong(command_id=1),
    messages.LoadProgress(command_id=1, model="m", bytes_done=1, bytes_total=2),
    messages.ModelLoaded(
        command_id=1,
        model="m",
        footprint=FOOTPRINT,
        max_context_tokens=2048,
        max_sequences=8,
        kv_cache_tokens=4096,
        load_seconds=0.1,
    ),
    messages.ModelUnloaded(command_id=1, model="m"),
    messages.Embedded(command_id=6, vector=b"\0\0\x80?"),
    messages.MemoryReport(command_id=1, total_bytes=10, free_bytes=4, models={"m": FOOTPRINT}),
    messages.CacheCleared(command_id=4, model="m", blocks=3),
    messages.GroupJoined(command_id=8, group="g", backend="gloo"),
    messages.CollectiveChecked(command_id=9, group="g", observed_sum=3.0),
    messages.GroupLeft(command_id=10, group="g"),
    messages.EngineReport(
        "m", 1, 2, kv_free_tokens=64, preemptions=4, drafted_tokens=6, accepted_tokens=5
    ),
    messages.Failed(code="step_failed", detail="why", sequence_id=7),
    messages.Bye(command_id=5),
]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda c: type(c).__name__)
def test_a_command_survives_the_wire(command: messages.Command) -> None:
    assert codec.decode_command(codec.encode(command)) == command


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda e: type(e).__name__)
def test_an_event_survives_the_wire(event: messages.Event) -> None:
    assert codec.decode_event(codec.encode(event)) == event


def test_every_message_has_an_example_above() -> None:
    assert {type(c) for c in EVERY_COMMAND} == set(messages.Command.__args__)
    assert {type(e) for e in EVERY_EVENT} == set(messages.Event.__args__)


def test_every_command_names_the_event_that_answers_it() -> None:
    assert messages.__doc__ is not None
    for command in messages.Command.__args__:
        assert f"\n    {command.__name__} " in messages.__doc__


def test_an_event_is_not_accepted_as_a_command() -> None:
    frame = codec.encode(EVERY_EVENT[0])

    with pytest.raises(ProtocolError, match="not a command"):
        codec.decode_command(frame)


def test_a_command_is_not_accepted_as_an_event() -> None:
    with pytest.raises(ProtocolError, match="not an event"):
        codec.decode_event(codec.encode(EVERY_COMMAND[0]))


def test_an_op_that_nobody_knows_is_refused_by_its_name() -> None:
    frame = msgspec.msgpack.encode({"op": "explode", "command_id": 1})

    with pytest.raises(ProtocolError, match="explode"):
        codec.decode_command(frame)


def test_a_field_this_version_does_not_know_is_refused() -> None:
    frame = msgspec.msgpack.encode({"op": "cancel", "command_id": 1, "sequence_id": 7, "why": "x"})

    with pytest.raises(ProtocolError, match="why"):
        codec.decode_command(frame)


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(ProtocolError, match="not a command"):
        codec.decode_command(b"\xc1 not MessagePack")


def test_another_protocol_version_is_refused_in_words() -> None:
    hello = msgspec.structs.replace(HELLO, protocol=messages.PROTOCOL_VERSION + 1)

    with pytest.raises(ProtocolError, match="restart the neuron after an upgrade"):
        messages.refuse_other_protocol(hello)


def test_the_same_protocol_version_is_welcome() -> None:
    messages.refuse_other_protocol(HELLO)


def test_a_footprint_adds_up() -> None:
    assert FOOTPRINT.total_bytes == 6
