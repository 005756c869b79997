"""One generation or embedding: the tokens it knows, and how many the KV cache has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cortex.ipc.messages import SamplingParams
from cortex.ipc.ring import Flag
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.block_pool import block_key
from cortex.runtime.device.drafts import Drafter
from cortex.runtime.device.reasoning_block import ReasoningBlock
from cortex.runtime.device.row import is_penalised
from cortex.runtime.device.token_counts import TokenCounts

if TYPE_CHECKING:  # the scheduler needs this file, and no torch
    from cortex.runtime.device.grammar import GrammarState

NO_ANSWER = SamplingParams(temperature=0.0, max_tokens=0, seed=0)
"""Of what ends when its prompt is computed: an embedding, say."""
UNKNOWN = -1
"""In a plan, the token that the step before is about to choose."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known, tokens computed; a preempted sequence forgets the second, never the first.

    ``is_due`` says that a step which chooses the next token has been launched and has not told it
    yet: that token is one to compute already, and unknown.
    """

    id: int
    tokens: list[int]  # the prompt, then what was generated
    sampling: SamplingParams
    pooling: Pooling | None = None  # of an embedding
    priority: int = 0
    prompt_tokens: int = field(init=False)
    reasoning: ReasoningBlock | None = field(init=False)
    counts: TokenCounts | None = field(init=False)  # where penalties need them
    drafter: Drafter | None = None
    grammar: GrammarState | None = None  # where the answer has to keep to one
    arrival: int = 0
    computed: int = 0
    due: int = 0
    """How many steps have been launched that choose a token of it and have not told it yet."""
    blocks: list[int] = field(default_factory=list)
    scored: int = 0
    """How many of the first tokens have been computed for what they say of the next one, where the
    log probabilities of the prompt are asked for."""
    known_blocks: int = 0
    """Of how many of the first blocks the pool knows what they hold."""
    state_slot: int | None = None  # of one that runs, where the model has recurrent states
    has_snapshots: bool = False
    snapshot_ends: list[int] = field(default_factory=list)
    """After how many tokens of the prompt its state is kept (``sequence_states.py``)."""
    has_joined: bool = False
    cached_tokens: int | None = None
    """How many tokens of the prompt were found computed when it joined first; None once told."""
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        budget = self.sampling.reasoning_budget
        self.reasoning = ReasoningBlock(budget) if budget else None
        self.counts = TokenCounts(self.tokens) if is_penalised(self.sampling) else None

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the order of sequences: the smallest goes first."""
        return -self.priority, self.arrival

    @property
    def remaining(self) -> int:
        """Tokens that are not computed: 1 while it only decodes, never 0."""
        return len(self.tokens) + self.due - self.computed

    @property
    def is_due(self) -> bool:
        """Whether a token of it is chosen already, or just now, and unknown."""
        return self.due > 0

    @property
    def forced(self) -> int | None:
        """The token that has to come next; None where the model chooses.

        A grammar may want something before it: the rest of a character that was begun.
        """
        forced = self.reasoning.forced if self.reasoning else None
        if forced is None or self.grammar is None or self.grammar.allows(forced):
            return forced
        return None

    @property
    def is_free_of_history(self) -> bool:
        """Whether logits alone decide what comes next, whatever was said before."""
        return self.can_draft and self.grammar is None

    @property
    def can_draft(self) -> bool:
        """Whether what comes next can be told for several tokens at once."""
        return self.reasoning is None and not is_penalised(self.sampling)

    @property
    def is_complete(self) -> bool:
        """Whether its grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def unscored(self) -> int:
        """Of how many tokens of the prompt the log probabilities are still to be computed."""
        is_asked = self.sampling.prompt_logprobs is not None
        return self.prompt_tokens - 1 - self.scored if is_asked else 0

    def within(self, rows: int) -> int:
        """Return how many tokens can be computed now if *rows* of logits may be of the prompt."""
        if self.unscored <= rows:
            return self.remaining
        return max(0, self.scored - self.computed) + rows

    def scored_by(self, count: int) -> list[int]:
        """Return the tokens of the prompt whose log probabilities the next *count* tokens tell."""
        if not self.unscored:
            return []
        first = max(self.computed, self.scored) + 1
        return self.tokens[first : min(self.computed + count + 1, self.prompt_tokens)]

    def last_possible(self, limit_tokens: int) -> int:
        """Return how many tokens it has at most when it ends."""
        return min(limit_tokens, self.prompt_tokens + self.sampling.max_tokens)

    def next_tokens(self, count: int) -> list[int]:
        """Return the first *count* tokens that are not computed."""
        tokens = self.tokens[self.computed : self.computed + count]
        return tokens + [UNKNOWN] * (count - len(tokens))

    @property
    def known_keys(self) -> list[bytes]:
        """The keys that were needed so far: all that the pool can know of it among them."""
        return self._keys

    def keys(self, count: int, block_tokens: int) -> list[bytes]:
        """Return the keys of the first *count* blocks, all of whose tokens are known."""
        for index in range(len(self._keys), count):
            before = self._keys[-1] if self._keys else b""
            tokens = self.tokens[index * block_tokens : (index + 1) * block_tokens]
            self._keys.append(block_key(before, tokens))
        return self._keys[:count]

    def append(self, token_id: int, limit_tokens: int) -> Flag:
        """Add a generated token; return its record's flags, with a finish where it is the last."""
        self.tokens.append(token_id)
        if self.reasoning:
            self.reasoning.add(token_id)
        if self.counts:
            self.counts.add(token_id)
        if self.drafter:
            self.drafter.note(self.tokens)
        if token_id in self.sampling.stop_token_ids:
            return Flag.TOKEN | Flag.STOP
        if self.grammar:
            self.grammar.accept(token_id)
            if self.grammar.is_complete:
                return Flag.TOKEN
            if self.drafter:
                self.drafter.expect(self.grammar.likely())
        if len(self.tokens) >= self.last_possible(limit_tokens):
            return Flag.TOKEN | Flag.LENGTH
        return Flag.TOKEN
