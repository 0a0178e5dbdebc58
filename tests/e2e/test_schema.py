"""Our routes against their description in /openapi.json, with inputs that schemathesis makes."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.server import ANSWER_TIMEOUT_S, KEY, Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
ROUTES = ("/v1/rlkv", "/v1/rlkv/forecast")
HEADERS = {"Authorization": f"Bearer {KEY}", "Connection": "close"}


Operations = dict[tuple[str, str], Any]


def operations_of(server: Server) -> Operations:
    """Our JSON routes by method and path."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)
    found = [o.ok() for o in schema.include(path_regex="rlkv").get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def statuses(operation: Any, mode: GenerationMode, examples: int) -> set[int]:
    """What is answered to inputs that the description allows, or forbids; checks each answer."""
    seen = set()

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        reply = case.call(headers=HEADERS, timeout=ANSWER_TIMEOUT_S)
        seen.add(reply.status_code)
        case.validate_response(reply, checks=CHECKS)

    check()
    return seen


@pytest.fixture(scope="module")
def operations(server: Server) -> Operations:
    return operations_of(server)


def test_all_routes_are_described(operations: Operations) -> None:
    assert set(operations) == {("GET", route) for route in ROUTES}


@pytest.mark.parametrize(
    ("route", "mode", "expected"),
    [
        ("/v1/rlkv", GenerationMode.POSITIVE, {200}),
        ("/v1/rlkv/forecast", GenerationMode.POSITIVE, {200, 400}),  # longer than the longest
        ("/v1/rlkv/forecast", GenerationMode.NEGATIVE, {400}),  # 200 where what is wrong is ignored
    ],
)
def test_answers_are_as_described(
    operations: Operations, route: str, mode: GenerationMode, expected: set[int]
) -> None:
    assert expected <= statuses(operations["GET", route], mode, 50) <= {200, 400}


@pytest.mark.parametrize("route", ["/rlkv", *ROUTES])
def test_other_methods_and_strange_addresses(server: Server, route: str) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=ANSWER_TIMEOUT_S) as client:
        for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE"):
            assert client.request(method, route).status_code == HTTPStatus.METHOD_NOT_ALLOWED
        for address in ("/", "//", "/%00", "/%2e%2e/x", "/\u00e9", "/" + "a" * 4000):
            status = client.get(route + address).status_code
            assert 300 <= status < 500, address
        same = client.get(route, params={"x": "<script>", "\x00": "1", "\u00e9": "\ud7ff"})
        assert same.status_code == HTTPStatus.OK
        assert "<script>1" not in same.text


def test_documentation_is_served(server: Server) -> None:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=ANSWER_TIMEOUT_S) as client:
        assert "/openapi.json" in client.get("/docs").text
        assert client.get("/openapi.json").json()["openapi"].startswith("3.")
