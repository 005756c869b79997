"""``/openapi.json`` is what the application is made of, and says it so that tools understand."""

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from aiohttp import web

from cortex.ipc import errors
from cortex.ipc.openai import PARAMETERS
from cortex.ipc.openapi import Interface, Route, document
from cortex.runtime.route_table import NEURON
from fake_node import BUILD, FakeNode, application, serving

SAID: dict[str, Any] = msgspec.json.decode(document(NEURON, "1"))
OPERATIONS = [
    (method, path, item[method])
    for path, item in SAID["paths"].items()
    for method in item.keys() - {"parameters"}
]
EVERY = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o[0]} {o[1]}")
REQUESTS = [
    (path, item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"])
    for path, item in SAID["paths"].items()
    if "post" in item
]


def schema(name: str) -> Any:
    """Return the component that the reference, or the name, *name* means."""
    return SAID["components"]["schemas"][name.rpartition("/")[2]]


def served(app: web.Application) -> set[tuple[str, str]]:
    """Return the methods and paths that *app* answers; HEAD comes with GET."""
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }


def written(said: dict[str, Any]) -> set[tuple[str, str]]:
    """Return the same of the document *said*."""
    return {
        (method.upper(), path)
        for path, item in said["paths"].items()
        for method in item.keys() - {"parameters"}
    }


async def test_every_route_of_the_application_is_in_it_and_no_other() -> None:
    async def more(_: web.Request) -> web.Response:
        return web.Response()

    app = application(FakeNode())

    assert served(app) == written(SAID)

    app.router.add_get("/{one:.+}/more", more)
    assert served(app) - written(SAID) == {("GET", "/{one}/more")}


async def test_it_is_served_from_memory_with_the_version_of_the_build() -> None:
    async with serving(FakeNode()) as client, client.get("/openapi.json") as response:
        body = await response.read()

        assert response.headers["Content-Type"] == "application/json"

    assert body == document(NEURON, BUILD.package_version)
    assert json.loads(body)["info"]["version"] == BUILD.package_version


def test_two_routes_of_one_path_share_it() -> None:
    async def handler(_: web.Request) -> web.Response:
        """Do nothing."""
        return web.Response()

    routes = [Route(m, r"/a/{index:\d{1,4}}", handler, {200: dict}) for m in ("GET", "POST")]

    paths = msgspec.json.decode(document(Interface("x", "y", routes), "1"))["paths"]

    assert paths["/a/{index}"].keys() == {"parameters", "get", "post"}


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(SAID)
    meant = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}

    assert meant <= SAID["components"]["schemas"].keys()


@pytest.mark.parametrize("name", SAID["components"]["schemas"])
def test_every_schema_is_one_of_json_schema(name: str) -> None:
    whole = {"$ref": f"#/components/schemas/{name}", "components": SAID["components"]}

    jsonschema_rs.Draft202012Validator(whole)


@EVERY
def test_an_operation_has_a_name_words_and_answers(operation: tuple[str, str, Any]) -> None:
    _, path, said = operation

    assert said["operationId"]
    assert path in said["description"]
    assert {"401", "500"} < said["responses"].keys()
    assert any(int(status) < 300 for status in said["responses"])


def test_operations_have_different_names() -> None:
    names = [said["operationId"] for *_, said in OPERATIONS]

    assert len(set(names)) == len(names)


@EVERY
def test_the_parameters_of_a_path_are_described(operation: tuple[str, str, Any]) -> None:
    _, path, _ = operation

    described = {parameter["name"] for parameter in SAID["paths"][path].get("parameters", [])}

    assert described == {part.partition("}")[0] for part in path.split("{")[1:]}


@EVERY
def test_a_refusal_names_its_codes(operation: tuple[str, str, Any]) -> None:
    *_, said = operation
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    of_code = {kind.code: kind.status for kind in kinds if issubclass(kind, errors.ApiError)}

    for status, answer in said["responses"].items():
        if int(status) < 400:
            continue
        _, narrowed = answer["content"]["application/json"]["schema"]["allOf"]
        codes = narrowed["properties"]["error"]["properties"]["code"]["enum"]
        assert codes
        assert {of_code[code] for code in codes} == {int(status)}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_is_described_with_its_events(path: str) -> None:
    content = SAID["paths"][path]["post"]["responses"]["200"]["content"]

    assert content.keys() == {"application/json", "text/event-stream"}
    event, error = content["text/event-stream"]["x-event-schema"]["anyOf"]
    assert "choices" in schema(event["$ref"])["properties"]
    assert "error" in schema(error["$ref"])["properties"]


def test_the_metrics_are_text() -> None:
    answer = SAID["paths"]["/metrics"]["get"]["responses"]["200"]

    assert answer["content"].keys() == {"text/plain"}


@pytest.mark.parametrize(("path", "reference"), REQUESTS)
def test_a_request_takes_nothing_that_it_does_not_name(path: str, reference: str) -> None:
    assert schema(reference)["additionalProperties"] is False, path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path, reference in REQUESTS
        for name in ("verbosity", "modalities", "user")
        if name in schema(reference)["properties"]
    ],
)
async def test_what_is_known_beside_a_request_is_described_as_it_is_taken(
    path: str, name: str
) -> None:
    described = schema(dict(REQUESTS)[path])["properties"][name]
    values = described.get("enum", [1])
    assert list(PARAMETERS.neutral.get(name, values)) == values

    async with serving(FakeNode("m")) as client:
        for value in [*values, "something else"]:
            async with client.post(path, json={"model": "m", name: value}) as response:
                error = (await response.json())["error"]
            is_refused = error["code"] == "unsupported_parameter" and error["param"] == name
            assert is_refused == (not _is_valid(described, value)), error


def _is_valid(described: dict[str, Any], value: Any) -> bool:
    return jsonschema_rs.Draft202012Validator(described).is_valid(value)
