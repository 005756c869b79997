"""llm-comply against the gateway, check by check: what it finds wrong is wrong, warnings included.

``CHECKS`` says which model answers. Where no wit is asked for that is the embedded one; calls and
reasoning need some, so a scripted device process stands in. What no model here can do is refused in
words, and the table has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import pytest
from llm_comply import http
from llm_comply.config import ComplianceConfig
from llm_comply.result import TestStatus as Status
from llm_comply.runner import TestRunner as Runner
from llm_comply.schema import SpecLoader
from llm_comply.test_case import TestCase as Check
from llm_comply.tests import get_tests

from stack import MODEL, Stack

pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver:DeprecationWarning")


@dataclass(frozen=True)
class Model:
    """Who answers a check: the embedded model or a script, under the name that the check needs."""

    name: str
    is_scripted: bool


EMBEDDED = Model(MODEL, is_scripted=False)
SCRIPTED = Model(MODEL, is_scripted=True)
SCRIPTED_GPT = Model("gpt-5-scripted", is_scripted=True)
"""llm-comply asks only models of certain names to reason."""
SCRIPTED_CLAUDE = Model("claude-sonnet-4-scripted", is_scripted=True)


@dataclass(frozen=True)
class Refused:
    """What cannot be had, the status and some of the words of the refusal."""

    status: int
    words: str


BLIND = Refused(400, "this model reads text only")
NO_COMPACTION = Refused(404, "a summary needs a prompt")
"""OpenAI's own prompt makes its summary; ours would be in the conversation's stead."""

CHECKS: dict[str, dict[str, Model | Refused]] = {
    "openai-chat": {
        "chat-basic-response": EMBEDDED,
        "chat-system-prompt": EMBEDDED,
        "chat-multi-turn": EMBEDDED,
        "chat-tool-calling": SCRIPTED,
        "chat-streaming-response": EMBEDDED,
        "chat-streaming-usage": EMBEDDED,
        "chat-image-input": BLIND,
        "chat-reasoning-summary": SCRIPTED_GPT,
        "chat-error-handling": EMBEDDED,
    },
    "open-responses": {
        "basic-response": EMBEDDED,
        "system-prompt": EMBEDDED,
        "multi-turn": EMBEDDED,
        "tool-calling": SCRIPTED,
        "streaming-response": EMBEDDED,
        "streaming-usage": EMBEDDED,
        "image-input": BLIND,
        "assistant-phase": EMBEDDED,
        "response-output-phase-schema": EMBEDDED,
        "compact-response": NO_COMPACTION,
        "compact-missing-model": NO_COMPACTION,
        "reasoning-summary": SCRIPTED_GPT,
        "error-handling": EMBEDDED,
    },
    "anthropic": {
        "anth-basic-response": EMBEDDED,
        "anth-system-prompt": EMBEDDED,
        "anth-multi-turn": EMBEDDED,
        "anth-tool-calling": SCRIPTED,
        "anth-streaming-response": EMBEDDED,
        "anth-streaming-usage": EMBEDDED,
        "anth-image-input": BLIND,
        "anth-thinking-display": SCRIPTED_CLAUDE,
        "anth-error-handling": EMBEDDED,
    },
}
SPECS = {
    "openai-chat": "openai_chat.json",
    "open-responses": "openresponses.json",
    "anthropic": "anthropic.json",
}
HEADERS: dict[str, list[dict[str, str]]] = {
    "openai-chat": [{}],
    "open-responses": [{}],
    "anthropic": [{"anthropic-version": day} for day in ("2023-06-01", "2026-10-21")],
}


@dataclass(frozen=True)
class Case:
    """A check of a format, asked with *headers*."""

    form: str
    headers: dict[str, str]
    check: Check

    def config(self, url: str, model: str) -> ComplianceConfig:
        """Return where llm-comply finds the gateway, and what it says to it."""
        return ComplianceConfig(f"{url}/v1", "none", model, extra_headers=self.headers)


def cases(kind: type) -> list[Any]:
    """Return the checks with an entry of *kind* in the table, and their entries."""
    return [
        pytest.param(
            Case(form, headers, check), found, id=" ".join([form, *headers.values(), check.id])
        )
        for form, table in CHECKS.items()
        for headers in HEADERS[form]
        for check in get_tests(form)
        if isinstance(found := table.get(check.id), kind)
    ]


@pytest.fixture(autouse=True)
def no_connection_stays() -> Iterator[None]:
    """Close what llm-comply opened: it has one pool for good."""
    yield
    http.close_client()


@pytest.mark.parametrize("form", CHECKS)
def test_the_table_has_every_check(form: str) -> None:
    assert list(CHECKS[form]) == [check.id for check in get_tests(form)]


@pytest.mark.parametrize(("case", "model"), cases(Model))
def test_a_check_passes_without_a_warning(
    case: Case, model: Model, stack: Stack, scripted_url: str
) -> None:
    config = case.config(scripted_url if model.is_scripted else stack.url, model.name)
    with as_file(files("llm_comply") / "specs" / SPECS[case.form]) as spec:
        runner = Runner(config, [], SpecLoader(str(spec)))

    result = runner.run_one(case.check)

    assert (result.errors, result.warnings) == ([], [])
    assert result.status is Status.PASSED


@pytest.mark.parametrize(("case", "refused"), cases(Refused))
def test_what_cannot_be_had_is_refused_in_words(
    case: Case, refused: Refused, scripted_url: str
) -> None:
    config = case.config(scripted_url, MODEL)

    status, said, _ = http.make_request(
        config, case.check.endpoint, case.check.build_request(config)
    )

    assert status == refused.status
    assert refused.words in said["error"]["message"]
    assert said.get("type") == ("error" if case.form == "anthropic" else None)
