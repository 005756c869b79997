"""How late the event loop is."""

import asyncio

import pytest

from cortex.gateway.loop_lag import LOOK_SECONDS, watch_loop_lag


class SlowLoop:
    """A clock, and a sleep that takes longer than it should by each of *lags*, then ends."""

    def __init__(self, *lags: float) -> None:
        self.now = 100.0
        self._lags = iter(lags)

    async def sleep(self, seconds: float) -> None:
        lag = next(self._lags, None)
        if lag is None:
            raise asyncio.CancelledError
        self.now += seconds + lag


async def test_the_lag_is_by_how_much_it_wakes_too_late() -> None:
    loop, seen = SlowLoop(0.0, 0.25, -0.001), list[float]()

    with pytest.raises(asyncio.CancelledError):
        await watch_loop_lag(seen.append, lambda: loop.now, loop.sleep)

    assert seen == pytest.approx([0.0, 0.25, 0.0])


async def test_it_looks_more_than_once_a_second() -> None:
    assert 0 < LOOK_SECONDS < 1
