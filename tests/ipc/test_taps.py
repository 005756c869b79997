"""The debug tap says what happens to whoever asks, and costs nothing where nobody does."""

import socket
import threading
from pathlib import Path

import msgspec
import pytest

from cortex.ipc.taps import Tap, listen


class Unencodable:
    """Would raise if anybody tried to serialise it."""


def first_message(directory: Path, topics: list[str], tap: Tap, topic: str) -> dict[str, object]:
    """Subscribe in a thread, wait until the tap sees it, publish once, return what arrived."""
    received: list[tuple[str, dict[str, object]]] = []
    listener = threading.Thread(target=lambda: received.append(next(listen(directory, topics))))
    listener.start()
    for _ in range(10_000):
        if tap.wants(topic):
            break
        listener.join(0.001)
    tap.publish(topic, {"answer": 42})
    listener.join(10)
    assert received[0][0] == topic
    return received[0][1]


def test_a_subscriber_sees_what_is_published(tmp_path: Path) -> None:
    tap = Tap(tmp_path, "supervisor")

    message = first_message(tmp_path, ["step"], tap, "step")

    assert message == {"process": "supervisor", "message": {"answer": 42}}
    tap.close()


def test_no_topic_means_every_topic(tmp_path: Path) -> None:
    tap = Tap(tmp_path, "cpu:0")

    assert first_message(tmp_path, [], tap, "event.hello")["process"] == "cpu:0"
    tap.close()


def test_nothing_is_serialised_while_nobody_listens(tmp_path: Path) -> None:
    tap = Tap(tmp_path, "supervisor")

    tap.publish("step", Unencodable())

    tap.close()


def test_what_cannot_be_encoded_is_a_bug_that_shows_once_somebody_listens(tmp_path: Path) -> None:
    tap = Tap(tmp_path, "supervisor")
    tap._topics.add(b"step")

    with pytest.raises(TypeError):
        tap.publish("step", Unencodable())
    tap.close()


def test_a_tap_that_is_switched_off_wants_nothing() -> None:
    tap = Tap(None, "supervisor")

    assert not tap.wants("step")
    tap.publish("step", {})
    tap.close()


def test_the_directory_belongs_to_the_daemon_alone(tmp_path: Path) -> None:
    tap = Tap(tmp_path / "taps", "supervisor")

    assert (tmp_path / "taps").stat().st_mode & 0o077 == 0
    tap.close()
    tap.close()


def test_listening_where_no_neuron_runs_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no neuron publishes"):
        next(listen(tmp_path, []))


def test_a_message_is_json_that_any_tool_can_read(tmp_path: Path) -> None:
    tap = Tap(tmp_path, "supervisor")
    message = first_message(tmp_path, ["request"], tap, "request")

    assert msgspec.json.decode(msgspec.json.encode(message)) == message
    tap.close()


def test_a_file_that_a_killed_neuron_left_behind_is_not_a_tap(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "supervisor.tap"))

    with pytest.raises(FileNotFoundError, match="no neuron publishes"):
        next(listen(tmp_path, []))


def test_a_closed_tap_leaves_no_file(tmp_path: Path) -> None:
    Tap(tmp_path, "supervisor").close()

    assert list(tmp_path.iterdir()) == []
