"""systemd hears from us exactly when it asked to."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from cortex.ipc import service_manager


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A listening service manager."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listener


def test_it_hears_that_we_are_ready(manager: socket.socket) -> None:
    assert service_manager.notify("READY=1")
    assert manager.recv(64) == b"READY=1"
    manager.close()


def test_an_abstract_socket_is_reached_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cortex-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")

        assert service_manager.notify("STOPPING=1")
        assert listener.recv(64) == b"STOPPING=1"


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    assert not service_manager.notify("READY=1")


def test_a_manager_that_went_away_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))

    assert not service_manager.notify("READY=1")


async def test_the_watchdog_is_fed_while_the_loop_turns(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    manager.setblocking(False)

    async with asyncio.timeout(10):
        feeding = asyncio.ensure_future(service_manager.feed_watchdog())
        loop = asyncio.get_running_loop()
        heard = [await loop.sock_recv(manager, 64) for _ in range(3)]
        feeding.cancel()

    assert heard == [b"WATCHDOG=1"] * 3
    manager.close()


async def test_a_unit_without_a_watchdog_needs_no_feeding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)

    await service_manager.feed_watchdog()


def test_a_watchdog_meant_for_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", "1")

    assert service_manager.watchdog_interval_seconds() is None
