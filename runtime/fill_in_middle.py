"""Filling in: what stands between a text and its suffix, for models that have tokens for it.

    family                          prompt
    most                            PREFIX before SUFFIX after MIDDLE
    those with the suffix first     SUFFIX after PREFIX before MIDDLE   (Mistral's have no MIDDLE)

(Bavarian et al., arXiv:2207.14255, call them PSM and SPM.) The tokens are those that a GGUF file
declares, else those of the first family below all of whose tokens the tokeniser has. A model's
training decides whether it fills in well: many that were only trained on text have the tokens too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FillMarks:
    """What is written around the two texts."""

    prefix: str
    suffix: str
    middle: str = ""
    is_suffix_first: bool = False

    def around(self, before: str, after: str) -> str:
        """Return the prompt whose answer belongs between *before* and *after*."""
        if self.is_suffix_first:
            return f"{self.suffix}{after}{self.prefix}{before}{self.middle}"
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"

    @property
    def tokens(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(filter(None, (self.prefix, self.suffix, self.middle)))


FAMILIES = (
    FillMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite 4
    FillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite code
    FillMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - DeepSeek
    FillMarks("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),  # Seed
    FillMarks("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    FillMarks("[PREFIX]", "[SUFFIX]", is_suffix_first=True),  # Codestral
)

ENDS = (
    "<|endoftext|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<|repo_name|>",
    "<|cursor|>",
    "<fim_pad>",
    "<file_sep>",
    "<repo_name>",
    "▁<EOT>",
)
"""Tokens that come where a model has filled in, and goes on to something else."""


def marks_of(
    tokens: Collection[str], declared: tuple[str, str, str] | None = None
) -> FillMarks | None:
    """Return the marks of a tokeniser with the marker *tokens*; None where it cannot fill in.

    *declared* are those that the checkpoint names: before the prefix, the suffix and the answer.
    """
    if declared is not None and all(token in tokens for token in declared):
        known = [family for family in FAMILIES if family.tokens == declared]
        return known[0] if known else FillMarks(*declared)
    found = (family for family in FAMILIES if all(token in tokens for token in family.tokens))
    return next(found, None)


def ends_of(marks: FillMarks, tokens: Collection[str]) -> list[str]:
    """Return those of the marker *tokens* that end what is filled in."""
    return [token for token in (*marks.tokens, *ENDS) if token in tokens]
