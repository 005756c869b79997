"""The real stack does what the gateway's document says: whatever it allows is answered.

Answers are kept to two tokens, and what would disturb the others who use the stack is left out.
``CORTEX_API_EXAMPLES`` tries more of each (8 in a plain run: seconds).
"""

import copy
import os
from typing import Any

import pytest
from schemathesis import GenerationMode

from api_cases import CONFORMS, name_of, operations, tried
from stack import MODEL, Stack

EXAMPLES = int(os.environ.get("CORTEX_API_EXAMPLES", "8"))
DISTURBING = ("/fleet/models/", "/fleet/nodes/")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def of_short_answers(said: dict[str, Any]) -> dict[str, Any]:
    """Return the document *said* with requests for two tokens at most."""
    said = copy.deepcopy(said)
    for schema in said["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties and (limits := [it for it in LIMITS if it in properties]):
            properties |= {limit: {"enum": [0, 2]} for limit in limits}
            schema["required"] = [*schema["required"], *limits]
    return said


@pytest.fixture(scope="module")
def said(stack: Stack) -> dict[str, Any]:
    """The document, as it is served."""
    return dict(stack.get("/openapi.json"))


def test_whatever_the_document_allows_is_answered_as_it_says(
    stack: Stack, said: dict[str, Any]
) -> None:
    for forms in operations(MODEL, of_short_answers(said)):
        if not any(path in name_of(forms) for path in DISTURBING):
            of_the_model = forms[1:]
            mode = GenerationMode.POSITIVE
            tried(of_the_model, mode, stack.url, CONFORMS, EXAMPLES, said=said)
