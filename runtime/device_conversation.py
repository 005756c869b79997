"""What a supervisor and one life of a device process still owe each other.

Every question is answered or ends with PeerGone, every generation and every embedding ends once
(``generation.py``, ``pending_vector.py``), whatever the device does. No I/O: commands go out
through ``send``, and whoever reads the channel and the ring calls ``hear`` and ``receive``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Literal

from cortex.ipc.errors import (
    ApiError,
    GrammarFailed,
    InvalidRequest,
    ModelNotFound,
    NodeFailed,
    Overloaded,
    PeerGone,
    Unloadable,
)
from cortex.ipc.messages import (
    Bye,
    CacheCleared,
    Cancel,
    CollectiveChecked,
    Command,
    Embed,
    Embedded,
    EngineReport,
    Event,
    Failed,
    Generate,
    GroupJoined,
    GroupLeft,
    Hello,
    LoadProgress,
    MemoryReport,
    ModelLoaded,
    ModelUnloaded,
    Pong,
    SamplingParams,
)
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.generation import Generation
from cortex.runtime.pending_vector import PendingVector

Progress = Callable[[int, int], None]
Running = Generation | PendingVector
FINISH = int(Flag.FINISH)


class Refused(Exception):
    """The device answered a question with *failed*."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(f"{failed.code}: {failed.detail}")
        self.failed = failed


class Conversation:
    """Open questions by command id, open generations and embeddings by sequence id.

    A Generate has the sequence's id as its command id too, so that a refusal that names either of
    them ends the generation; of an Embed both are one.
    """

    def __init__(self, send: Callable[[Command], None], ids: itertools.count[int]) -> None:
        self.generations: dict[int, Generation] = {}
        self.vectors: dict[int, PendingVector] = {}
        self.reports: dict[str, EngineReport] = {}
        """The last of each model."""
        self._send = send
        self._ids = ids
        self._questions: dict[int, asyncio.Future[Event]] = {}
        self._progress: dict[int, Progress] = {}
        self._ended: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the device owes us anything."""
        return bool(self.generations or self.vectors or self._questions)

    def tell(self, command: Callable[[int], Command]) -> None:
        """Send ``command(id)``; its answer, if any, is not waited for."""
        self._send(command(next(self._ids)))

    async def ask(
        self, question: Callable[[int], Command], progress: Progress | None = None
    ) -> Event:
        """Send ``question(id)`` and return its answer.

        Raise Refused where that is a Failed, PeerGone where the device dies before it.
        """
        if self._ended is not None:
            raise PeerGone(self._ended)
        command_id = next(self._ids)
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._questions[command_id] = answer
        if progress is not None:
            self._progress[command_id] = progress
        try:
            self._send(question(command_id))
            return await answer
        finally:
            self._questions.pop(command_id, None)
            self._progress.pop(command_id, None)

    def generate(
        self,
        model_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        priority: int = 0,
    ) -> Generation:
        """Start a sequence; of those that wait a higher *priority* goes first."""
        sequence_id = next(self._ids)
        generation = Generation(sequence_id, model_id, self._cancel)
        if self._ended is not None:
            generation.fail(NodeFailed(self._ended))
            return generation
        self.generations[sequence_id] = generation
        self._send(
            Generate(sequence_id, sequence_id, model_id, prompt_token_ids, sampling, priority)
        )
        return generation

    def embed(
        self, model_id: str, prompt_token_ids: list[int], pooling: Literal["last", "mean"]
    ) -> PendingVector:
        """Start an embedding."""
        command_id = next(self._ids)
        vector = PendingVector(command_id, model_id, self._cancel)
        if self._ended is not None:
            vector.fail(NodeFailed(self._ended))
            return vector
        self.vectors[command_id] = vector
        self._send(Embed(command_id, model_id, prompt_token_ids, pooling))
        return vector

    @property
    def running(self) -> list[Running]:
        """The generations and embeddings that the device still works on."""
        return [*self.generations.values(), *self.vectors.values()]

    def of_model(self, model_id: str) -> list[Running]:
        """Return those of *model_id*."""
        return [running for running in self.running if running.model_id == model_id]

    def fail_model(self, model_id: str, error: ApiError) -> None:
        """End every generation and embedding of *model_id* with *error*."""
        for running in self.of_model(model_id):
            self._fail(running.sequence_id, error)

    def receive(self, records: list[TokenRecord]) -> None:
        """Give the ring's *records* to their generations; those of an ended one are dropped."""
        batches: dict[int, list[TokenRecord]] = {}
        for record in records:
            batches.setdefault(record.sequence_id, []).append(record)
        for sequence_id, batch in batches.items():
            generation = self.generations.get(sequence_id)
            if generation is not None:
                generation.add(batch)
            if batch[-1].flags & FINISH:
                self.generations.pop(sequence_id, None)

    def hear(self, event: Event) -> None:
        """Pass *event* on to whom it answers. Empty the ring into ``receive`` before."""
        match event:
            case LoadProgress():
                self._report(event)
            case Embedded():
                self._give(event)
            case Failed(sequence_id=int(sequence_id)):
                self._fail(sequence_id, api_error(event))
            case Failed(command_id=int(command_id)):
                self._refuse(command_id, event)
            case EngineReport():
                self.reports[event.model] = event
            case ModelUnloaded():
                self.reports.pop(event.model, None)
                self._answer(event.command_id, event)
            case Pong() | ModelLoaded() | MemoryReport() | CacheCleared() | Bye():
                self._answer(event.command_id, event)
            case GroupJoined() | CollectiveChecked() | GroupLeft():
                self._answer(event.command_id, event)
            case Failed() | Hello():
                pass  # of the process as a whole: the owner of this life acts on it

    def end(self, error: ApiError) -> None:
        """Nothing will come any more: fail whatever is open. Empty the ring before."""
        self._ended = str(error)
        for running in self.running:
            self._fail(running.sequence_id, error)
        for question in self._questions.values():
            if not question.done():
                question.set_exception(PeerGone(str(error)))

    def _cancel(self, sequence_id: int) -> None:
        if self._ended is None:
            self.tell(lambda command_id: Cancel(command_id, sequence_id))

    def _fail(self, sequence_id: int, error: ApiError) -> None:
        generation = self.generations.pop(sequence_id, None)
        running = generation or self.vectors.pop(sequence_id, None)
        if running is not None:
            running.fail(error)

    def _give(self, embedded: Embedded) -> None:
        vector = self.vectors.pop(embedded.command_id, None)
        if vector is not None:
            vector.give(embedded.vector)

    def _answer(self, command_id: int, event: Event) -> None:
        question = self._questions.get(command_id)
        if question is not None and not question.done():
            question.set_result(event)

    def _refuse(self, command_id: int, failed: Failed) -> None:
        question = self._questions.get(command_id)
        if question is None:
            self._fail(command_id, api_error(failed))
        elif not question.done():
            question.set_exception(Refused(failed))

    def _report(self, event: LoadProgress) -> None:
        progress = self._progress.get(event.command_id)
        if progress is not None:
            progress(event.bytes_done, event.bytes_total)


_ERRORS: dict[str, type[ApiError]] = {
    **{error.code: error for error in ApiError.__subclasses__() if error is not Unloadable},
    "empty_prompt": InvalidRequest,
    "grammar_failed": GrammarFailed,
    "invalid_sampling": InvalidRequest,
    "token_out_of_range": InvalidRequest,
    "model_not_loaded": ModelNotFound,
    "out_of_memory": Overloaded,
}


def api_error(failed: Failed) -> ApiError:
    """Return the HTTP error of a sequence that *failed*: the one of its code, else NodeFailed."""
    error = _ERRORS.get(failed.code)
    if error is None:
        return NodeFailed(f"{failed.code}: {failed.detail}")
    return error(failed.detail)
