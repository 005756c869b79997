"""What a sequence may say next, guessed from what it has said: speculation by prompt lookup.

Answers repeat: code that is edited, names, quotes, JSON keys. Where the last tokens occurred
before, the tokens that followed then are the draft; the next step computes them together with the
last known token, and keeps as many as the sampler would have chosen (Leviathan et al.,
arXiv:2211.17192; the lookup is that of apoorvumang/prompt-lookup-decoding). The sampler is a
function of logits, seed and position alone, so a draft changes when a token comes, never which.

A draft costs what one more row of a step costs, and pays what it is likely to be right. How likely
is learnt per sequence from every guess, drafted or not: guesses are compared with what comes also
while none is drafted, so a sequence that begins to repeat itself is noticed for free.
"""

from __future__ import annotations

from typing import NamedTuple

LONGEST_DRAFT = 8
_LONGEST_MATCH = 4
_SHORTEST_MATCH = 2
_REMEMBERED_TOKENS = 8192
"""Of a long text only the last so many are looked at, or up to twice as many: time and memory have
a bound."""
_LEARNING_RATE = 0.15
_FIRST_LIKELIHOOD = 0.5


class Costs(NamedTuple):
    """What drafts add to a step, in units of a step of one row.

    Any at all add ``step``, each row of them ``row``.
    """

    step: float
    row: float

    def price(self, rows: int) -> Costs:
        """Return what drafts of one sequence in a step of *rows* cost, in tokens.

        A step takes 1 + row * (rows - 1); meanwhile each sequence gets a token without drafts.
        """
        duration = 1 + self.row * (rows - 1)
        return Costs(self.step / duration, self.row * rows / duration)


COSTS = {"cpu": Costs(0.0, 0.25), "cuda": Costs(1.0, 0.02)}
"""By kind of device. CPU: a row takes 0.86 of 3.9 ms (scripts/bench-step, 2 cores, AVX-512,
2026-11-21). GPU: estimates, not measured yet; a step with drafts runs without a graph, and nothing
is prepared while it runs."""


class Drafter:
    """Follows the tokens of one sequence, and guesses the next ones."""

    def __init__(self) -> None:
        self.likelihood = _FIRST_LIKELIHOOD
        """How likely a guessed token is right."""
        self._after: dict[tuple[int, ...], int] = {}
        """Of some tokens, the position after the last of them."""
        self._seen = 0
        self._guess: list[int] = []  # of the tokens that come next

    def is_hopeful(self, price: Costs) -> bool:
        """Whether a guess, if there is one, would be worth its *price*."""
        return self._worthwhile(price) > 0

    def draft(self, price: Costs, most: int) -> list[int]:
        """Return at most *most* likely tokens that are worth their *price*, each and together."""
        return self._guess[: min(most, self._worthwhile(price))]

    def expect(self, tokens: list[int]) -> None:
        """Guess that *tokens* come next, where there are some: somebody knows better."""
        if tokens:
            self._guess = tokens[:LONGEST_DRAFT]

    def note(self, tokens: list[int]) -> None:
        """Learn from the last of *tokens*, all that the sequence knows, and guess the next."""
        if self._guess:
            is_right = self._guess[0] == tokens[-1]
            self.likelihood += _LEARNING_RATE * (is_right - self.likelihood)
            self._guess = self._guess[1:] if is_right else []
        self._look_up(tokens)

    def _worthwhile(self, price: Costs) -> int:
        """Return how many tokens in a row are each likelier to be reached and right than dear."""
        likely, count, gain = self.likelihood, 0, 0.0
        while count < LONGEST_DRAFT and likely > price.row:
            count += 1
            gain += likely - price.row
            likely *= self.likelihood
        return count if gain > price.step else 0

    def _look_up(self, tokens: list[int]) -> None:
        self._learn_places(tokens)
        for length in range(_LONGEST_MATCH, _SHORTEST_MATCH - 1, -1):
            at = self._after.get(tuple(tokens[-length:]))
            if at is not None:
                period = tokens[at : at + LONGEST_DRAFT]  # what comes again, and again
                self._guess = [period[index % len(period)] for index in range(LONGEST_DRAFT)]
                return

    def _learn_places(self, tokens: list[int]) -> None:
        """Note where each run of tokens was followed by another one, the last run excepted."""
        if len(self._after) > 2 * _REMEMBERED_TOKENS * (_LONGEST_MATCH - _SHORTEST_MATCH + 1):
            self._after.clear()
            self._seen = 0
        first = max(self._seen, len(tokens) - _REMEMBERED_TOKENS, _SHORTEST_MATCH)
        for at in range(first, len(tokens)):
            for length in range(_SHORTEST_MATCH, min(_LONGEST_MATCH, at) + 1):
                self._after[tuple(tokens[at - length : at])] = at
        self._seen = len(tokens)
