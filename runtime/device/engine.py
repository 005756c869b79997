"""One model on this device: sequences in, and with every step records, vectors and failures out.

    step()   schedule -> forward -> sample -> report        generations
                      -> hidden  -> pool   ->               embeddings, in a pass of their own

A request that is wrong is refused by ``start`` and touches nothing. A sequence whose logits or
vector are not finite ends alone. A step that fails ends the sequences that were in it (where memory
ran out only the youngest of them; the others are tried again); only a fault of the device itself is
raised, as DeviceLost. Whatever happens, the blocks of an ended sequence are free again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog

from cortex.ipc.messages import Embed, Embedded, Failed, Generate
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.embedding import Pooler
from cortex.runtime.device.faults import is_device_fault, is_out_of_memory
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.sampler import sample
from cortex.runtime.device.sampling_bounds import refuse_bad_sampling
from cortex.runtime.device.scheduler import PlannedSequence, Scheduler, StepPlan
from cortex.runtime.device.sequence import NO_ANSWER, Sequence

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did, and what it has to say: records first, then events."""

    tokens: int
    sequences: int
    records: list[TokenRecord] = field(default_factory=list)
    events: list[Embedded | Failed] = field(default_factory=list)


class Engine:
    """Continuous batching over one model's paged cache."""

    def __init__(
        self, model: str, runner: ModelRunner, limits: Limits, *, token_budget: int
    ) -> None:
        self.model = model
        self.limits = limits
        self.pool = BlockPool(limits.blocks, BLOCK_TOKENS)
        self._runner = runner
        self._pooler = Pooler()
        self._scheduler = Scheduler(
            self.pool,
            max_sequences=limits.max_sequences,
            max_context_tokens=limits.max_context_tokens,
            token_budget=token_budget,
        )

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._scheduler

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(len(self._scheduler))

    def start(self, command: Generate | Embed) -> None:
        """Queue a sequence; raise Refused for one that cannot be computed."""
        self._refuse_bad_tokens(command.prompt_token_ids)
        prompt = list(command.prompt_token_ids)
        match command:
            case Generate():
                self._refuse_too_long(len(prompt) + 1, "and its answer's first token ")
                refuse_bad_sampling(command.sampling, self._runner.vocab_size)
                self._scheduler.add(Sequence(command.sequence_id, prompt, command.sampling))
            case Embed():
                self._refuse_too_long(len(prompt))
                self._scheduler.add(
                    Sequence(command.command_id, prompt, NO_ANSWER, command.pooling)
                )

    def cancel(self, sequence_id: int) -> list[TokenRecord | Failed]:
        """End a sequence; return its last word, or nothing where it has ended already."""
        sequence = self._end(sequence_id)
        return [] if sequence is None else [_cancelled(sequence)]

    def cancel_all(self) -> list[TokenRecord | Failed]:
        """End every sequence; return their last words."""
        return [w for sequence_id in self._scheduler.sequence_ids for w in self.cancel(sequence_id)]

    def step(self) -> StepReport:
        """Run one step; raise DeviceLost where the device failed in it."""
        plan = self._scheduler.schedule()
        try:
            chosen = self._choose(plan.generations)
            vectors = self._pool(plan.embeddings)
        except Exception as exc:
            if is_device_fault(exc):
                raise DeviceLost(f"in a step of {self.model}: {exc}") from exc
            return self._give_up(plan, exc)
        self._scheduler.advance(plan)
        report = StepReport(plan.tokens, len(plan.sequences))
        for planned, choice in zip(plan.sampled, chosen, strict=True):
            self._tell_choice(report, planned.sequence_id, choice)
        for sequence_id, vector in vectors.items():
            self._tell_vector(report, sequence_id, vector)
        return report

    def _choose(self, plan: StepPlan) -> list[Chosen]:
        if not plan.sequences:
            return []
        return sample(self._runner.forward(plan), [_row(planned) for planned in plan.sampled])

    def _pool(self, plan: StepPlan) -> Mapping[int, bytes | None]:
        if not plan.sequences:
            return {}
        return self._pooler.add(plan.sequences, self._runner.hidden(plan))

    def _tell_choice(self, report: StepReport, sequence_id: int, chosen: Chosen) -> None:
        if chosen.token_id is None:
            detail = "the model's logits had a NaN or an infinity; the request ends here"
            report.events.append(self._fail(sequence_id, "unhealthy_logits", detail))
            return
        report.records.extend(
            TokenRecord(sequence_id, token_id, logprob, Flag.TOP, rank)
            for rank, (token_id, logprob) in enumerate(chosen.top, 1)
        )
        flags = self._scheduler.append(sequence_id, chosen.token_id)
        report.records.append(TokenRecord(sequence_id, chosen.token_id, chosen.logprob, flags))

    def _tell_vector(self, report: StepReport, sequence_id: int, vector: bytes | None) -> None:
        if vector is None:
            detail = "the embedding has no length, a NaN or an infinity"
            report.events.append(self._fail(sequence_id, "unhealthy_logits", detail))
        else:
            self._end(sequence_id)
            report.events.append(Embedded(sequence_id, vector))

    def _give_up(self, plan: StepPlan, error: Exception) -> StepReport:
        """End what cannot go on after *error*; nothing of *plan* counts as computed."""
        ended = [planned.sequence_id for planned in plan.sequences]
        if is_out_of_memory(error):
            _log.warning("out of memory in a step", model=self.model, tokens=plan.tokens)
            code, detail, ended = "out_of_memory", "the device ran out of memory", ended[-1:]
        else:
            _log.error("step failed", model=self.model, tokens=plan.tokens, exc_info=error)
            code, detail = "step_failed", f"a step of {self.model} failed: {type(error).__name__}"
        failures: list[Embedded | Failed] = [
            self._fail(sequence_id, code, detail) for sequence_id in ended
        ]
        return StepReport(plan.tokens, len(plan.sequences), events=failures)

    def _fail(self, sequence_id: int, code: str, detail: str) -> Failed:
        sequence = self._end(sequence_id)
        assert sequence is not None, "only what is in a step fails in it"
        return _failed(sequence, code, detail)

    def _end(self, sequence_id: int) -> Sequence | None:
        self._pooler.forget(sequence_id)
        return self._scheduler.end(sequence_id)

    def _refuse_bad_tokens(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise Refused("empty_prompt", "the prompt has no tokens")
        if min(token_ids) < 0 or max(token_ids) >= self._runner.vocab_size:
            raise Refused(
                "token_out_of_range",
                f"token ids go from 0 to {self._runner.vocab_size - 1}, "
                f"the prompt's from {min(token_ids)} to {max(token_ids)}",
            )

    def _refuse_too_long(self, tokens: int, what: str = "") -> None:
        """Raise Refused where the prompt *what* takes more *tokens* than there can ever be."""
        if tokens > self.limits.max_context_tokens:
            raise Refused(
                "context_length_exceeded",
                f"the prompt {what}takes {tokens} tokens, "
                f"the context has {self.limits.max_context_tokens}",
            )
        if tokens > self.pool.tokens:
            raise Refused(
                "prompt_too_long_for_memory",
                f"the prompt {what}takes {tokens} tokens, "
                f"the KV cache of {self.model} has room for {self.pool.tokens}",
            )


def _row(planned: PlannedSequence) -> Row:
    return Row(
        planned.sampling,
        planned.end_position,
        planned.known,
        planned.prompt_tokens,
        planned.forced,
    )


def _cancelled(sequence: Sequence) -> TokenRecord | Failed:
    if sequence.pooling is None:
        return TokenRecord(sequence.id, 0, math.nan, Flag.CANCELLED)
    return _failed(sequence, "cancelled", "the embedding was cancelled")


def _failed(sequence: Sequence, code: str, detail: str) -> Failed:
    """A generation is named by its sequence, an embedding by its command."""
    if sequence.pooling is None:
        return Failed(code, detail, sequence_id=sequence.id)
    return Failed(code, detail, command_id=sequence.id)
