"""One model on this device: sequences in, and with every step records and failures out.

    step()   schedule -> forward -> sample -> report

A request that is wrong is refused by ``start`` and touches nothing. A sequence whose logits are
not finite ends alone. A step that fails ends the sequences that were in it (where memory ran out
only the youngest of them; the others are tried again); only a fault of the device itself is
raised, as DeviceLost. Whatever happens, the blocks of an ended sequence are free again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import structlog

from cortex.ipc.messages import Failed, Generate, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.faults import is_device_fault, is_out_of_memory
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.sampler import Row, sample
from cortex.runtime.device.scheduler import Scheduler, StepPlan
from cortex.runtime.device.sequence import Sequence

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did, and what it has to say: records first, then failures."""

    tokens: int
    sequences: int
    records: list[TokenRecord] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)


class Engine:
    """Continuous batching over one model's paged cache."""

    def __init__(
        self, model: str, runner: ModelRunner, limits: Limits, *, token_budget: int
    ) -> None:
        self.model = model
        self.limits = limits
        self.pool = BlockPool(limits.blocks, BLOCK_TOKENS)
        self._runner = runner
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

    def start(self, command: Generate) -> None:
        """Queue a sequence; raise Refused for one that cannot be generated."""
        self._refuse_bad_prompt(command.prompt_token_ids)
        _refuse_bad_sampling(command.sampling)
        self._scheduler.add(
            Sequence(command.sequence_id, list(command.prompt_token_ids), command.sampling)
        )

    def cancel(self, sequence_id: int) -> list[TokenRecord]:
        """End a sequence; return its last record, or nothing where it has ended already."""
        return [_cancelled(sequence_id)] if self._scheduler.end(sequence_id) else []

    def cancel_all(self) -> list[TokenRecord]:
        """End every sequence; return their last records."""
        return [r for sequence_id in self._scheduler.sequence_ids for r in self.cancel(sequence_id)]

    def step(self) -> StepReport:
        """Run one step; raise DeviceLost where the device failed in it."""
        plan = self._scheduler.schedule()
        try:
            chosen = self._choose(plan)
        except Exception as exc:
            if is_device_fault(exc):
                raise DeviceLost(f"in a step of {self.model}: {exc}") from exc
            return self._give_up(plan, exc)
        self._scheduler.advance(plan)
        return self._report(plan, chosen)

    def _choose(self, plan: StepPlan) -> list[int | None]:
        logits = self._runner.forward(plan)
        return sample(logits, [Row(s.sampling, s.end_position) for s in plan.sampled])

    def _report(self, plan: StepPlan, chosen: list[int | None]) -> StepReport:
        report = StepReport(plan.tokens, len(plan.sequences))
        for planned, token in zip(plan.sampled, chosen, strict=True):
            if token is None:
                detail = "the model's logits had a NaN or an infinity; the request ends here"
                report.failures.append(self._fail(planned.sequence_id, "unhealthy_logits", detail))
            else:
                flags = self._scheduler.append(planned.sequence_id, token)
                report.records.append(TokenRecord(planned.sequence_id, token, math.nan, flags))
        return report

    def _give_up(self, plan: StepPlan, error: Exception) -> StepReport:
        """End what cannot go on after *error*; nothing of *plan* counts as computed."""
        ended = [planned.sequence_id for planned in plan.sequences]
        if is_out_of_memory(error):
            _log.warning("out of memory in a step", model=self.model, tokens=plan.tokens)
            code, detail, ended = "out_of_memory", "the device ran out of memory", ended[-1:]
        else:
            _log.error("step failed", model=self.model, tokens=plan.tokens, exc_info=error)
            code, detail = "step_failed", f"a step of {self.model} failed: {type(error).__name__}"
        failures = [self._fail(sequence_id, code, detail) for sequence_id in ended]
        return StepReport(plan.tokens, len(plan.sequences), failures=failures)

    def _fail(self, sequence_id: int, code: str, detail: str) -> Failed:
        self._scheduler.end(sequence_id)
        return Failed(code=code, detail=detail, sequence_id=sequence_id)

    def _refuse_bad_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise Refused("empty_prompt", "the prompt has no tokens")
        if min(token_ids) < 0 or max(token_ids) >= self._runner.vocab_size:
            raise Refused(
                "token_out_of_range",
                f"token ids go from 0 to {self._runner.vocab_size - 1}, "
                f"the prompt's from {min(token_ids)} to {max(token_ids)}",
            )
        if len(token_ids) >= self.limits.max_context_tokens:
            raise Refused(
                "context_length_exceeded",
                f"the prompt has {len(token_ids)} tokens, and with the answer's first more than "
                f"the {self.limits.max_context_tokens} of the context",
            )
        if len(token_ids) >= self.pool.tokens:
            raise Refused(
                "prompt_too_long_for_memory",
                f"the prompt has {len(token_ids)} tokens, the KV cache of {self.model} has room "
                f"for {self.pool.tokens}, the answer's included",
            )


def _refuse_bad_sampling(sampling: SamplingParams) -> None:
    """Raise Refused for what no request that was checked can hold."""
    bounds = {
        "temperature": 0 <= sampling.temperature < math.inf,  # false for a NaN
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= 0,
        "max_tokens": sampling.max_tokens >= 1,
    }
    for name, holds in bounds.items():
        if not holds:
            value = getattr(sampling, name)
            raise Refused("invalid_sampling", f"{name} is {value}, which is out of range")


def _cancelled(sequence_id: int) -> TokenRecord:
    return TokenRecord(sequence_id, 0, math.nan, Flag.CANCELLED)
