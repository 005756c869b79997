"""One model on this device: sequences in, and with every step records, vectors and failures out.

    step()   schedule -> launch -> land -> report            generations
                      -> hidden -> pool ->                   embeddings, in a pass of their own

    on a CPU                          on a GPU, which goes on while the next step is prepared
    schedule n                        schedule n + 1, whose tokens are still unknown
    launch n: forward, sample         launch n + 1
    land n                            land n

Where the tokens that are due decide more than themselves (penalties, a reasoning budget, drafts, a
grammar), a step lands before the next is scheduled.

Of a sequence's rows of logits the first may tell the log probabilities of its prompt, the others
choose tokens. One that is to have none (``max_tokens`` 0) chooses one that nobody is told.

A sequence with a grammar is queued once that is compiled (``grammar.py``); its masks are computed
during the forward pass. It ends where nothing can follow, in a record of its own without a token.

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

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Embed, Embedded, EngineReport, Failed, Generate
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.drafts import COSTS
from cortex.runtime.device.embedding import Pooler
from cortex.runtime.device.faults import is_device_fault, is_out_of_memory
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, Launched, Runner
from cortex.runtime.device.refusal import DeviceLost, Refused
from cortex.runtime.device.row import Chosen
from cortex.runtime.device.sampling_bounds import refuse_bad_sampling
from cortex.runtime.device.scheduler import Scheduler
from cortex.runtime.device.sequence import NO_ANSWER, Sequence
from cortex.runtime.device.sequence_states import RecurrentStates
from cortex.runtime.device.state_pool import StatePool
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.step_rows import rows_of
from cortex.runtime.device.vocabulary import without_vocabulary

DEFAULT_OPTIONS = EngineOptions()
_log = structlog.get_logger()


@dataclass(slots=True)
class StepReport:
    """What a step did, and what it has to say: records first, then events.

    ``tokens`` and ``sequences`` are those that were launched, ``accepted`` the ``drafted`` tokens
    that were right; records and events may be those of the step before.
    """

    tokens: int = 0
    sequences: int = 0
    drafted: int = 0
    accepted: int = 0
    records: list[TokenRecord] = field(default_factory=list)
    events: list[Embedded | Failed] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that was launched and has not landed."""

    plan: StepPlan  # of generations
    launched: Launched

    @property
    def has_drafts(self) -> bool:
        """Whether nobody knows yet how many tokens it brings."""
        return any(planned.drafts for planned in self.plan.sequences)


class Engine:
    """Continuous batching over one model's paged cache."""

    def __init__(
        self,
        model: str,
        runner: Runner,
        limits: Limits,
        *,
        token_budget: int,
        device_type: str = "cpu",
        options: EngineOptions = DEFAULT_OPTIONS,
        grammars: Grammars | None = None,
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Without *grammars* a sequence that has one fails.

        *special_ids* are tokens that no merge crosses (``sequence_states.py``).
        """
        self.model = model
        self.limits = limits
        self.pool = BlockPool(limits.blocks, BLOCK_TOKENS)
        self._runner = runner
        self._pooler = Pooler()
        self._grammars = grammars or Grammars(without_vocabulary, runner.vocab_size)
        self._compiling: dict[int, Sequence] = {}
        self._news: list[Failed] = []
        self._flight: Flight | None = None
        self._drafted = self._accepted = 0
        self._scheduler = Scheduler(
            self.pool,
            max_sequences=limits.max_sequences,
            max_context_tokens=limits.max_context_tokens,
            token_budget=token_budget,
            keeps_prefixes=options.prefix_cache,
            draft_costs=COSTS[device_type] if options.speculation else None,
            states=_states(limits, options, special_ids),
        )

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._scheduler or sequence_id in self._compiling

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(len(self._scheduler) or self._news) or self._flight is not None

    @property
    def fds(self) -> list[int]:
        """Readable when ``take_compiled`` has something to do."""
        return self._grammars.fds

    def take_compiled(self) -> None:
        """Queue the sequences whose grammars are compiled by now."""
        for sequence_id, outcome in self._grammars.take():
            sequence = self._compiling.pop(sequence_id, None)
            if sequence is None:  # cancelled by then
                continue
            if isinstance(outcome, str):
                self._news.append(_failed(sequence, "grammar_failed", outcome))
            else:
                sequence.grammar = outcome
                self._scheduler.add(sequence)

    def close(self) -> None:
        """Give up what runs beside the steps."""
        self._grammars.close()

    def start(self, command: Generate | Embed) -> None:
        """Queue a sequence; raise Refused for one that cannot be computed."""
        self._refuse_bad_tokens(command.prompt_token_ids)
        prompt = list(command.prompt_token_ids)
        match command:
            case Generate():
                self._refuse_too_long(len(prompt) + 1, "and its answer's first token ")
                refuse_bad_sampling(command.sampling, self._runner.vocab_size)
                sequence = Sequence(
                    command.sequence_id, prompt, command.sampling, priority=command.priority
                )
                self._queue(sequence)
            case Embed():
                self._refuse_too_long(len(prompt))
                self._scheduler.add(
                    Sequence(command.command_id, prompt, NO_ANSWER, command.pooling)
                )

    def _queue(self, sequence: Sequence) -> None:
        """Let *sequence* join, after its grammar is compiled where it has one."""
        grammar = sequence.sampling.grammar
        if grammar is None:
            self._scheduler.add(sequence)
        else:
            self._compiling[sequence.id] = sequence
            self._grammars.ask(sequence.id, grammar, sequence.sampling.stop_token_ids)

    def cancel(self, sequence_id: int) -> list[TokenRecord | Failed]:
        """End a sequence; return its last word, or nothing where it has ended already."""
        self._grammars.give_up(sequence_id)
        sequence = self._compiling.pop(sequence_id, None) or self._end(sequence_id)
        return [] if sequence is None else [_cancelled(sequence)]

    def cancel_all(self) -> list[TokenRecord | Failed]:
        """End every sequence; return their last words."""
        sequence_ids = [*self._scheduler.sequence_ids, *self._compiling]
        return [word for sequence_id in sequence_ids for word in self.cancel(sequence_id)]

    def clear_prefix_cache(self) -> int:
        """Forget what could be used again, and return how many blocks of it there were."""
        return self._scheduler.clear_prefixes()

    def standing(self) -> EngineReport:
        """Return how it stands now."""
        return EngineReport(
            self.model,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting) + len(self._compiling),
            kv_free_tokens=self.pool.free * self.pool.block_tokens,
            preemptions=self._scheduler.preemptions,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )

    def step(self) -> StepReport:
        """Run one step; raise DeviceLost where the device failed in it."""
        report = StepReport(events=[*self._news])
        self._news.clear()
        if self._scheduler.has_to_know or (self._flight and self._flight.has_drafts):
            self._land(report)
        plan = self._scheduler.schedule()
        flight = self._launch(plan, report) if plan.sequences else None
        self._land(report)
        self._flight = flight
        if not self._runner.runs_ahead:
            self._land(report)
        self._drafted += report.drafted
        self._accepted += report.accepted
        return report

    def _launch(self, plan: StepPlan, report: StepReport) -> Flight | None:
        """Begin *plan*; its embeddings are told at once."""
        report.tokens, report.sequences = plan.tokens, len(plan.sequences)
        generations, embeddings = plan.generations, plan.embeddings
        try:
            rows = rows_of(generations, self._scheduler.grammar_of, self._grammars)
            launched = self._runner.launch(generations, rows)
            vectors = self._pool(embeddings)
        except Exception as exc:  # noqa: BLE001 - what it is decides who ends
            self._give_up(plan, exc, report)
            self._scheduler.give_up()
            return None
        self._scheduler.advance(plan)
        for sequence_id, vector in vectors.items():
            self._tell_vector(report, sequence_id, vector)
        return Flight(generations, launched)

    def _land(self, report: StepReport) -> None:
        """Wait for the step that was launched, if any, and tell what it chose."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            chosen = flight.launched.result()
        except Exception as exc:  # noqa: BLE001 - what it is decides who ends
            self._scheduler.clear_prefixes()  # what it computed is known already, also of the ended
            self._give_up(flight.plan, exc, report, was_launched=True)
            return
        at = 0
        for planned in flight.plan.sampled:
            if planned.sequence_id in self._scheduler:  # else it has ended since the launch
                self._tell_rows(report, planned, chosen[at : at + planned.rows])
            at += planned.rows

    def _pool(self, plan: StepPlan) -> Mapping[int, bytes | None]:
        if not plan.sequences:
            return {}
        return self._pooler.add(plan.sequences, self._runner.hidden(plan))

    def _tell_rows(
        self, report: StepReport, planned: PlannedSequence, chosen: list[Chosen]
    ) -> None:
        """Tell what a sequence's rows say of its prompt, and what they choose."""
        scores = len(planned.scored)
        if scores and not self._tell_scores(report, planned.sequence_id, chosen[:scores]):
            return
        if not planned.samples:
            return
        if planned.sampling.max_tokens or chosen[-1].token_id is None:
            self._tell_choices(report, planned, chosen[scores:] if scores else chosen)
        else:
            self._tell_prompt(report, planned.sequence_id)
            self._end(planned.sequence_id)
            report.records.append(TokenRecord(planned.sequence_id, 0, math.nan, Flag.LENGTH))

    def _tell_scores(self, report: StepReport, sequence_id: int, scores: list[Chosen]) -> bool:
        """Tell log probabilities of a prompt; return whether there are any, else it has failed."""
        if any(score.token_id is None for score in scores):
            report.events.append(self._fail_choice(sequence_id, is_stuck=False))
            return False
        for score in scores:
            report.records += _records(sequence_id, score, Flag.SCORE)
        return True

    def _tell_choices(
        self, report: StepReport, planned: PlannedSequence, chosen: list[Chosen]
    ) -> None:
        """Tell a sequence's first token, and those after it as long as the drafts were right."""
        for choice, draft in zip(chosen, [*planned.drafted, None], strict=True):
            is_right = draft is not None and choice.token_id == draft
            flags = self._tell_choice(report, planned.sequence_id, choice, is_right)
            report.drafted += draft is not None
            report.accepted += is_right
            if flags & Flag.FINISH or not is_right:
                return

    def _tell_choice(
        self, report: StepReport, sequence_id: int, chosen: Chosen, is_computed: bool
    ) -> Flag:
        """Tell one token; return its flags, a finish for a sequence that failed."""
        if chosen.token_id is None:
            report.events.append(self._fail_choice(sequence_id, is_stuck=chosen.is_stuck))
            return Flag.FINISH
        self._tell_prompt(report, sequence_id)
        flags = self._scheduler.append(sequence_id, chosen.token_id, is_computed=is_computed)
        report.records += _records(sequence_id, chosen, flags)
        if not flags & Flag.FINISH and self._scheduler.is_complete(sequence_id):
            self._end(sequence_id)
            flags = Flag.STOP
            report.records.append(TokenRecord(sequence_id, chosen.token_id, math.nan, flags))
        return flags

    def _fail_choice(self, sequence_id: int, *, is_stuck: bool) -> Failed:
        """End a sequence for which no token could be chosen."""
        grammar = self._scheduler.grammar_of(sequence_id)
        if not is_stuck or grammar is None:
            detail = "the model's logits had a NaN or an infinity; the request ends here"
            return self._fail(sequence_id, "unhealthy_logits", detail)
        detail = f"no token can follow in the grammar: {grammar.fault or 'the model has none'}"
        return self._fail(sequence_id, "grammar_failed", detail)

    def _tell_prompt(self, report: StepReport, sequence_id: int) -> None:
        """Tell before a sequence's first token how much of its prompt was found computed."""
        cached_tokens = self._scheduler.cached_tokens_once(sequence_id)
        if cached_tokens is not None:
            report.records.append(TokenRecord(sequence_id, cached_tokens, math.nan, Flag.PROMPT))

    def _tell_vector(self, report: StepReport, sequence_id: int, vector: bytes | None) -> None:
        if vector is None:
            detail = "the embedding has no length, a NaN or an infinity"
            report.events.append(self._fail(sequence_id, "unhealthy_logits", detail))
        else:
            self._end(sequence_id)
            report.events.append(Embedded(sequence_id, vector))

    def _give_up(
        self, plan: StepPlan, error: Exception, report: StepReport, *, was_launched: bool = False
    ) -> None:
        """End what cannot go on after *error*; raise DeviceLost where that is everything.

        Nothing of a *plan* that could not be launched counts as computed; of one that was launched
        everything does already, so nobody in it can go on.
        """
        if isinstance(error, DeviceLost):
            raise error
        if is_device_fault(error):
            raise DeviceLost(f"in a step of {self.model}: {error}") from error
        ended = [p.sequence_id for p in plan.sequences if p.sequence_id in self._scheduler]
        if is_out_of_memory(error):
            _log.warning("out of memory in a step", model=self.model, tokens=plan.tokens)
            code, detail = "out_of_memory", "the device ran out of memory"
            ended = ended if was_launched else ended[-1:]
        else:
            _log.error("step failed", model=self.model, tokens=plan.tokens, exc_info=error)
            code, detail = "step_failed", f"a step of {self.model} failed: {type(error).__name__}"
        report.events.extend(self._fail(sequence_id, code, detail) for sequence_id in ended)

    def _fail(self, sequence_id: int, code: str, detail: str) -> Failed:
        sequence = self._end(sequence_id, is_healthy=False)
        assert sequence is not None, "only what is in a step fails in it"
        return _failed(sequence, code, detail)

    def _end(self, sequence_id: int, *, is_healthy: bool = True) -> Sequence | None:
        self._pooler.forget(sequence_id)
        return self._scheduler.end(sequence_id, is_healthy=is_healthy)

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


def _states(
    limits: Limits, options: EngineOptions, special_ids: frozenset[int]
) -> RecurrentStates | None:
    if not limits.state_slots:
        return None
    return RecurrentStates(
        StatePool(limits.state_slots),
        BLOCK_TOKENS,
        special_ids=special_ids,
        keeps_prefixes=options.prefix_cache,
    )


def _records(sequence_id: int, chosen: Chosen, flags: Flag) -> list[TokenRecord]:
    """Return the record of a token, and before it those of the likeliest ones."""
    assert chosen.token_id is not None, "a row without a token has no record"
    tops = [
        TokenRecord(sequence_id, token_id, logprob, Flag.TOP, rank)
        for rank, (token_id, logprob) in enumerate(chosen.top, 1)
    ]
    return [*tops, TokenRecord(sequence_id, chosen.token_id, chosen.logprob, flags)]


def _cancelled(sequence: Sequence) -> TokenRecord | Failed:
    if sequence.pooling is None:
        return TokenRecord(sequence.id, 0, math.nan, Flag.CANCELLED)
    return _failed(sequence, "cancelled", "the embedding was cancelled")


def _failed(sequence: Sequence, code: str, detail: str) -> Failed:
    """A generation is named by its sequence, an embedding by its command."""
    if sequence.pooling is None:
        return Failed(code, detail, sequence_id=sequence.id)
    return Failed(code, detail, command_id=sequence.id)
