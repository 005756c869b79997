"""A script in a process of its own that answers questions, one line of JSON each.

    parent                          child
    Child("engine_child.py", ...)   answers({"decode": decode, ...})
    ask("decode", batch=8)   ──►    decode(batch=8)
    {"seconds": ...}         ◄──    what it returned; or {"trouble": in words}

The child's standard output is kept for the answers: whatever a library prints goes to its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from answers import Trouble
from quickstart import LOGS, die_with_parent

SCRIPTS = Path(__file__).resolve().parent
STOP_SECONDS = 30.0

Answers = Mapping[str, Callable[..., dict[str, Any]]]


class Late(Trouble):
    """The child did not answer in time; it has been killed."""


class Child:
    """``python SCRIPT ARGUMENTS`` until the end of its context; its log is ``.cache/NAME.log``."""

    def __init__(
        self,
        name: str,
        script: str,
        *arguments: object,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.name = name
        LOGS.mkdir(exist_ok=True)
        self.log = LOGS / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / script), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the parent, which then ends it
                preexec_fn=die_with_parent(),  # noqa: PLW1509 (this process has one thread)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._answers.close()

    def ask(self, what: str, seconds: float | None = None, **details: Any) -> dict[str, Any]:
        """Return the answer; raise Late after *seconds*, Trouble where there is none."""
        try:
            self._questions.write(json.dumps([what, details]).encode() + b"\n")
            self._questions.flush()
        except (BrokenPipeError, ValueError) as exc:
            raise Trouble(f"{self.name} is not there any more; log: {self.log}") from exc
        if not select.select([self._answers], [], [], seconds)[0]:
            self.process.kill()
            raise Late(f"{self.name} took more than {seconds:.0f} s")
        line = self._answers.readline()
        if not line:
            raise Trouble(f"{self.name} ended without an answer; log: {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "trouble" in answer:
            raise Trouble(f"{self.name}: {answer['trouble']}")
        return answer

    @property
    def _questions(self) -> IO[bytes]:
        assert self.process.stdin is not None, "it is a pipe"
        return self.process.stdin

    @property
    def _answers(self) -> IO[bytes]:
        assert self.process.stdout is not None, "it is a pipe"
        return self.process.stdout


@contextlib.contextmanager
def answers_kept() -> Iterator[IO[str]]:
    """Yield where answers go; what libraries print from now on goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)
        yield answers


def answer(answers: Answers, line: str) -> str:
    """Return the answer to the question in *line*, as a line; Trouble is one too."""
    what, details = json.loads(line)
    try:
        said = answers[what](**details)
    except Trouble as exc:
        said = {"trouble": str(exc)}
    return json.dumps(said) + "\n"


def answer_questions(answers: Answers) -> None:
    """Answer until the parent has no more questions."""
    with answers_kept() as out:
        for line in sys.stdin:
            out.write(answer(answers, line))
