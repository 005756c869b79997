"""Where an answer's reasoning block is, and which token has to be put in to end it in time.

    open ──► each token: 1 longer ──► as long as the budget, and not ended: its end is put in
     ▲                    │
     └─ start ─ closed ◄──┴─ end, by the model or put in

What is put in are real tokens of the answer, one a step. Where the model has itself produced the
beginning of the end when the budget strikes, only the rest is put in. A block whose start is part
of the prompt is open from the first token, and comes once.

All of it follows from the tokens of the answer alone: each is looked at once, and a sequence that
is preempted forgets none. The marks are found by the automaton of Knuth, Morris and Pratt (SIAM J.
Comput. 6, 1977, doi:10.1137/0206024). No torch.
"""

from __future__ import annotations

from cortex.ipc.messages import ReasoningBudget


class ReasoningBlock:
    """Follows the tokens of one answer."""

    def __init__(self, budget: ReasoningBudget) -> None:
        self._max_tokens = budget.max_tokens
        self._start = _Mark(budget.start_token_ids)
        self._end = _Mark(budget.end_token_ids)
        self._is_open = not budget.start_token_ids
        self._tokens = 0

    @property
    def forced(self) -> int | None:
        """The token that has to come next; None where the model chooses."""
        return self._end.next if self._is_open and self._tokens >= self._max_tokens else None

    def add(self, token_id: int) -> None:
        """Note a token of the answer."""
        if not self._is_open:
            self._is_open = self._start.ends_with(token_id)
            self._tokens = 0
        elif self._end.ends_with(token_id):
            self._is_open = False
        else:
            self._tokens += 1


class _Mark:
    """Token ids that are looked for; ``matched`` of them are the last that came."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._ids = token_ids
        self._matched = 0
        self._shorter = [0] * (len(token_ids) + 1)
        """For the first n ids, how many of the first are also the last of them."""
        for length in range(1, len(token_ids)):
            self._shorter[length + 1] = self._longer(self._shorter[length], token_ids[length])

    @property
    def next(self) -> int:
        """The id that is missing next."""
        return self._ids[self._matched]

    def ends_with(self, token_id: int) -> bool:
        """Note a token; return whether it completes the mark, and then begin anew."""
        self._matched = self._longer(self._matched, token_id)
        if not self._matched or self._matched < len(self._ids):
            return False
        self._matched = 0
        return True

    def _longer(self, matched: int, token_id: int) -> int:
        """Return how many ids match once *token_id* has come after the first *matched*."""
        while matched and self._ids[matched] != token_id:
            matched = self._shorter[matched]
        return matched + (bool(self._ids) and self._ids[matched] == token_id)
