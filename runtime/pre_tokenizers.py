"""How byte-level BPE cuts text before it merges, by the name GGUF files give it.

``tokenizer.ggml.pre`` names the cutting rule of the original tokenizer.json, which llama.cpp's
converter recognised by its output. The rules here are those of the original files, so that ids
equal the reference's (transformers); llama.cpp's differ only in that it never normalises.

    smollm               each digit alone, then GPT-2's pattern       (HuggingFaceTB/SmolLM2)
    gpt-2, default       GPT-2's pattern                              (openai-community/gpt2)
    llama-bpe            up to three digits; whole words first        (meta-llama/Llama-3.1)
    qwen2                each digit alone; NFC first                  (Qwen/Qwen2.5, Qwen3)
    qwen35               the same, marks stay with their letters      (Qwen/Qwen3.5)

``default`` is what old converters wrote where they did not know the rule; nearly all such files
are GPT-2's.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

GPT2 = "gpt-2"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One rule. *pattern* is GPT2 (the built-in one) or an Oniguruma pattern of the pieces.

    ``ignore_merges``: a piece that is a token as a whole needs no merges (tiktoken's way).
    ``adds_bos``: what holds where the file does not say.
    """

    pattern: str = GPT2
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the library's object; bytes become the characters of the byte-level alphabet."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern != GPT2:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        uses_gpt2 = self.pattern == GPT2
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=uses_gpt2))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """Return what is done to text before it is cut."""
        return normalizers.NFC() if self.nfc else None


# One pattern, three ways of writing letters and digits (OpenAI's cl100k_base, adapted).
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
    r"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS = {
    "smollm": PreTokenizer(single_digits=True),
    "gpt-2": PreTokenizer(),
    "default": PreTokenizer(),
    "llama-bpe": PreTokenizer(
        _CL100K.format(letters=r"\p{L}", digits=r"\p{N}{1,3}", marks=""),
        ignore_merges=True,
        adds_bos=True,
    ),
    "qwen2": PreTokenizer(_CL100K.format(letters=r"\p{L}", digits=r"\p{N}", marks=""), nfc=True),
    "qwen35": PreTokenizer(
        _CL100K.format(letters=r"[\p{L}\p{M}]", digits=r"\p{N}", marks=r"\p{M}"), nfc=True
    ),
}
