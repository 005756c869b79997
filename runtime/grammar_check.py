"""Whether grammars can be enforced, before the device is asked; what llguidance found, in words.

    request ─► verdict known? ─► line, first come first served ─► child process
                                                                  2 s and 1 GiB for a grammar

A child that takes longer is killed, one that takes more dies; the grammar is refused in words, and
the next one gets a new child, 0.2 s later. So a hostile grammar holds up others for 2 s at most.
The verdicts of the last grammars are known, bad ones too. The child starts with the first grammar
and ends with the neuron, however that ends (``grammar_reader.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec
import structlog

from cortex.ipc.errors import InternalError, InvalidRequest, Overloaded, Recovering
from cortex.runtime.grammar_reader import READY, Question

KEPT = 1024
"""Verdicts, of 16 bytes and mostly no text."""
LARK_PLACE = "structured_outputs.grammar"
LARK = "Lark, in llguidance's dialect: start: NUMBER, a line for each rule"
CHILD = (sys.executable, "-m", "cortex.runtime.grammar_reader")
LINE_BYTES = 1 << 16
"""Of an answer, several times as long as any."""
_log = structlog.get_logger()


class Part(NamedTuple):
    """A grammar to be checked, and the place in the request that it comes from."""

    grammar: str
    place: str


class ControlTokens(Protocol):
    """What is asked of a model's text side."""

    @property
    def control_tokens(self) -> dict[int, bytes]:
        """The tokens that are no text, by their ids."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a grammar may take, and how many may wait."""

    seconds: float = 2.0
    memory_bytes: int = 1 << 30
    start_seconds: float = 30.0
    waiting: int = 32


DEFAULT_BOUNDS = Bounds()


class GrammarCheck:
    """Checks the grammars of a neuron's requests, one after the other."""

    def __init__(
        self,
        bounds: Bounds = DEFAULT_BOUNDS,
        kept: int = KEPT,
        command: Sequence[str] = CHILD,
    ) -> None:
        self._bounds = bounds
        self._kept = kept
        self._command = command
        self._found: OrderedDict[bytes, str] = OrderedDict()
        self._line = asyncio.Lock()
        self._waiting = 0
        self._child: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """The child, if there is one now."""
        return self._child.pid if self._child else None

    async def refuse_bad(self, parts: Sequence[Part], tokens: ControlTokens) -> None:
        """Raise InvalidRequest, naming its place, for the first part that cannot be enforced.

        Raise Overloaded where too many wait.
        """
        if not parts:
            return
        control = tokens.control_tokens
        for part in dict.fromkeys(parts):
            found = await self._fault(msgspec.json.encode(Question(part.grammar, control)))
            if found:
                hint = f" (a grammar is read as {LARK})" if part.place == LARK_PLACE else ""
                raise InvalidRequest(f"{part.place}: {found}{hint}", param=part.place)

    async def close(self) -> None:
        """Kill the child, whatever it is at."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _fault(self, question: bytes) -> str:
        """Return what is wrong with a grammar, from memory or after waiting in line."""
        key = blake2b(question, digest_size=16).digest()
        if key not in self._found:
            if self._waiting >= self._bounds.waiting:
                raise Overloaded(
                    f"{self._waiting} grammars wait to be checked", retry_after_seconds=2
                )
            self._waiting += 1
            try:
                async with self._line:
                    if key not in self._found:
                        self._found[key] = await self._ask(question)
            finally:
                self._waiting -= 1
        self._found.move_to_end(key)
        found = self._found[key]
        while len(self._found) > self._kept:
            self._found.popitem(last=False)
        return found

    async def _ask(self, question: bytes) -> str:
        """Return the child's answer; one that is not waited for any more costs it its life."""
        try:
            child = await self._started()
            async with asyncio.timeout(self._bounds.seconds):
                answer = await _answer(child, question)
        except TimeoutError:
            await self.close()
            _log.warning("grammar reader killed", after_seconds=self._bounds.seconds)
            return f"it takes more than {self._bounds.seconds:g} s to compile"
        except BaseException:
            await self.close()
            raise
        if answer is None:
            return await self._why_it_died(child)
        return answer

    async def _started(self) -> asyncio.subprocess.Process:
        """Return the child, ready; raise InternalError where none can be had."""
        if self._child is not None and self._child.returncode is None:
            return self._child
        self._child = child = await asyncio.create_subprocess_exec(
            *(*self._command, str(os.getpid()), str(self._bounds.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # what is said at the end of memory is said by us
            start_new_session=True,  # a Ctrl-C is ours to answer
            limit=LINE_BYTES,
        )
        assert child.stdout is not None
        try:
            async with asyncio.timeout(self._bounds.start_seconds):
                said = await child.stdout.readline()
        except TimeoutError:
            said = b""
        if said != READY:
            raise InternalError("the process that checks grammars does not start")
        return child

    async def _why_it_died(self, child: asyncio.subprocess.Process) -> str:
        """Return why a child ended over a grammar, which is memory unless llguidance broke."""
        status = await child.wait()
        self._child = None
        _log.warning("grammar reader lost", reader=child.pid, exit_code=status)
        if status == -signal.SIGKILL:  # by somebody else, who says nothing of the grammar
            raise Recovering(
                "the process that checks grammars is started again", retry_after_seconds=1
            )
        if status == -signal.SIGABRT:  # how Rust ends there
            size = f"{self._bounds.memory_bytes >> 20} MiB"
            return f"it takes more than {size} of memory to compile"
        return "it could not be compiled"


async def _answer(child: asyncio.subprocess.Process, question: bytes) -> str | None:
    """Return what *child* says to *question*, None where it dies over it."""
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(ConnectionError):
        child.stdin.write(question + b"\n")
        await child.stdin.drain()
    line = await child.stdout.readline()
    return msgspec.json.decode(line, type=str) if line.endswith(b"\n") else None
