"""The grammar of a whole answer: reasoning, then calls or the text that was demanded.

    asked                                    the answer
    a text's format                          reasoning? text
    a text's format, and tools               reasoning? (calls | text)
    a call: required, or of a named tool     reasoning? calls
    tools, some of them strict               reasoning? any text with calls in it

A named tool is called once, others once or, unless parallel calls are off, several times. Without
tools that are forced, strict, or beside a format there is no grammar, and calls are as the model
writes them. Of tools that may be called the arguments are enforced of those that are strict.

Rules speak of markers by their tokens where these are control tokens, as text else. An answer ends
where its grammar lets it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cortex.ipc.errors import InvalidRequest
from cortex.runtime.conversation import CallDemand
from cortex.runtime.reasoning import ReasoningFormat
from cortex.runtime.structured import MAX_GRAMMAR_BYTES, Demand
from cortex.runtime.tool_grammars import Blocks, CallGrammar, Rules

OPTIONS = '%llguidance {"no_forcing": true}'
"""All tokens that the grammar allows may come, not only those that a tokenizer would write."""


def of_text(demand: Demand) -> str:
    """Return the grammar of an answer that is nothing but the text that is demanded."""
    return _composed("start: @text", demand)


def of_answer(
    demand: Demand | None,
    calls: CallDemand,
    *,
    control_id: Callable[[str], int | None],
    call_grammar: CallGrammar | None,
    reasoning: ReasoningFormat | None,
    is_open: bool,
) -> str | None:
    """Return the grammar, or None where nothing is demanded; raise InvalidRequest.

    *control_id* finds control tokens by their texts. *reasoning* is None where none can come;
    *is_open* says that it has begun. No *call_grammar* means that no tools are offered.
    """
    if demand is None and not calls.needs_grammar:
        return None
    rules = Rules(control_id)
    said = _said(rules, demand, calls, call_grammar)
    before = _reasoning(rules, reasoning, is_open=is_open) if reasoning else ""
    return _composed("\n".join([f"start: {before}{said}", *rules.lines]), demand)


def _said(
    rules: Rules, demand: Demand | None, calls: CallDemand, call_grammar: CallGrammar | None
) -> str:
    """Return the part of ``start`` behind the reasoning."""
    if call_grammar is None or not calls.tools:
        return "@text"
    blocks = call_grammar(rules, calls.tools, calls.is_many)
    if calls.is_forced:
        return _calls(rules, blocks, calls)
    if demand and blocks.at_start:
        raise InvalidRequest(
            "this model writes calls as JSON at the start of an answer, so what begins there "
            "cannot be told from a text of a format: leave out the format, or the tools",
            param=demand.place,
        )
    if demand:
        return f"({_calls(rules, blocks, calls)} | @text)"
    return _text_and_calls(rules, blocks, calls)


def _calls(rules: Rules, blocks: Blocks, calls: CallDemand) -> str:
    """Return the name of a rule for nothing but calls."""
    if blocks.at_start:
        return blocks.at_start
    marker, body = next(iter(blocks.opened.items()))
    block = rules.add(f"{rules.marker(marker)} {body}")
    if calls.is_many and blocks.repeats:
        return rules.add(rf'{block} ("\n"? {block})*')
    return block


def _text_and_calls(rules: Rules, blocks: Blocks, calls: CallDemand) -> str:
    """Return the name of a rule for any text with calls in it.

    Where calls may stand at the start, text begins with something else.
    """
    text = "ANY"
    if blocks.at_start:
        rules.lines.append(r"TEXT: /(\s*[^\s{](?s:.)*)?/")
        text = "TEXT"
    opened = [f"{rules.until(marker, after=text)} {body}" for marker, body in blocks.opened.items()]
    times = "*" if calls.is_many and blocks.repeats else "?"
    said = rules.add(f"({' | '.join(opened)}){times} {text}")
    return rules.add(f"{said} | {blocks.at_start}") if blocks.at_start else said


def _reasoning(rules: Rules, form: ReasoningFormat, *, is_open: bool) -> str:
    """Return the part of ``start`` for the reasoning, with the line breaks behind it."""
    block = rules.add(rf"{rules.until(form.end)} /\n{{1,2}}/?")
    if is_open:
        return f"{block} "
    return f"({rules.marker(form.begin)} {block})? "


def _composed(main: str, demand: Demand | None) -> str:
    """Return llguidance's JSON of the grammar *main* and of the text's; raise InvalidRequest."""
    grammars = [{"name": "answer", "lark_grammar": f"{OPTIONS}\n{main}"}]
    if demand:
        grammars.append({"name": "text", "lark_grammar": demand.lark})
    text = msgspec.json.encode({"grammars": grammars}).decode()
    if len(text) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(
            f"all schemas together make a grammar of {len(text)} characters; "
            f"at most {MAX_GRAMMAR_BYTES} are taken",
            param=demand.place if demand else "tools",
        )
    return text
