"""Telling systemd how we are: ready, reloading, stopping, alive.

The protocol is one datagram to the socket in ``NOTIFY_SOCKET`` (sd_notify(3)); without it, nothing
happens.
"""

from __future__ import annotations

import asyncio
import os
import socket


def notify(state: str) -> bool:
    """Send *state* (``READY=1``, ``STOPPING=1``, ...); return whether a service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK  # never the loop's brake
    with socket.socket(socket.AF_UNIX, kind) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError:
            return False  # a manager that went away is no reason to fail
    return True


def watchdog_interval_seconds() -> float | None:
    """Return half of what the unit's WatchdogSec allows, or None where none is set for us."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2e6


async def feed_watchdog() -> None:
    """Say that the event loop turns, for as long as it does; return at once without a watchdog."""
    interval = watchdog_interval_seconds()
    if interval is None:
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
