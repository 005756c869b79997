"""The random numbers are those of the paper, and depend on seed and position only."""

import pytest

from cortex.runtime.device.philox import Words, philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_it_gives_the_known_answers_of_random123(
    counter: Words, key: tuple[int, int], words: Words
) -> None:
    assert philox4x32(counter, key) == words


def test_a_uniform_number_is_at_least_zero_and_below_one() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]

    assert min(numbers) >= 0
    assert max(numbers) < 1
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


def test_every_seed_and_position_has_its_own_number() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}

    assert len(numbers) == 2500


def test_a_negative_seed_is_as_good_as_any() -> None:
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
