"""A running child is sent descriptors, by the name of what they are for."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex.ipc.descriptors import Descriptor, wake_up
from cortex.ipc.post import Letters, Post
from post_child import counts, take_in_a_child


@pytest.fixture
def post() -> Iterator[Post]:
    post = Post()
    yield post
    post.close()


@pytest.fixture
def letters(post: Post) -> Iterator[Letters]:
    letters = Letters(post.letters)
    yield letters
    letters.close()


def counter(value: int) -> Descriptor:
    made = wake_up()
    os.eventfd_write(made.fd, value)
    return made


def test_a_child_that_runs_already_gets_what_it_is_sent(post: Post) -> None:
    spawn = multiprocessing.get_context("spawn")
    (child_told, told), (answers, child_answers) = spawn.Pipe(False), spawn.Pipe(False)
    child = spawn.Process(target=take_in_a_child, args=(post.letters, child_told, child_answers))
    child.start()

    post.send("g", [counter(3), counter(4)])
    told.send("g")

    assert answers.poll(20.0)
    assert answers.recv() == [3, 4]
    told.send(None)
    child.join(20.0)
    assert child.exitcode == 0


def test_each_group_gets_its_own_whatever_the_order(post: Post, letters: Letters) -> None:
    post.send("a", [counter(1)])
    post.send("b", [counter(2)])

    assert counts(letters.take("b")) == [2]
    assert counts(letters.take("a")) == [1]
    assert letters.take("a") is None


def test_what_was_sent_again_replaces_what_nobody_took_and_closes_it(
    post: Post, letters: Letters
) -> None:
    post.send("a", [counter(1)])
    letters.take("b")
    before = len(set(Path("/proc/self/fd").iterdir()))
    post.send("a", [counter(2)])

    taken = letters.take("a")

    assert len(set(Path("/proc/self/fd").iterdir())) == before + 1, "the counter made here"
    assert counts(taken) == [2]


def test_a_post_that_is_gone_sends_nothing(post: Post, letters: Letters) -> None:
    post.close()

    assert letters.take("a") is None


def test_sending_to_a_child_that_is_gone_is_an_error(post: Post, letters: Letters) -> None:
    post.letters.close()
    letters.close()

    with pytest.raises(OSError, match=r"Broken pipe|reset|not connected"):
        post.send("a", [wake_up()])


def test_the_post_leaves_no_descriptor_behind_also_of_letters_that_nobody_took() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    post = Post()
    letters = Letters(post.letters)
    mine = [wake_up(), wake_up()]
    post.send("a", mine)
    letters.take("b")

    letters.close()
    post.close()
    for descriptor in mine:
        descriptor.close()

    assert set(Path("/proc/self/fd").iterdir()) == before


def test_what_arrives_is_closed_when_the_process_becomes_another_program(
    post: Post, letters: Letters
) -> None:
    post.send("a", [wake_up()])

    arrived = letters.take("a")

    assert arrived is not None
    assert not os.get_inheritable(arrived[0].fd)
