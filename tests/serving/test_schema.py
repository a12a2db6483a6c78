"""The server keeps what `/openapi.json` promises: schemathesis makes requests out of it and reads the answers by it.

A request that fits the description may still be refused, as a text that is no picture is; with a documented status.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi

from minigpt4.serving.settings import Limits, Settings
from tests.serving.live import MODEL, Live, live

CHECKED = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.negative_data_rejection,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    limits = replace(Limits(), max_new_tokens=8)
    with live(Settings(MODEL, decoders=1, limits=limits)) as running:
        yield running


def keeps_its_description(server: Live, examples: int) -> int:
    """Ask so many fitting and so many unfitting requests at each address; returns how many were asked."""
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked = 0
    for found in description.get_all_operations():
        operation = found.ok()
        # Without a body nothing can be unfit: the name of a model is any text.
        for mode in GenerationMode if operation.body else (GenerationMode.POSITIVE,):

            @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def run(case: schemathesis.Case) -> None:
                nonlocal asked
                asked += 1
                case.call_and_validate(base_url=server.url, checks=CHECKED)

            run()
    return asked


def test_every_answer_fits_the_description(server: Live) -> None:
    assert keeps_its_description(server, 8) > 40


def test_the_description_has_every_field_and_a_page_that_loads_nothing(server: Live) -> None:
    description = server.ask("GET", "/openapi.json").json
    fields = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "num_beams", "stop", "stream_options"} <= set(fields)
    assert {"/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(description["paths"])
    assert "security" not in description  # no key is wanted here
    page = server.ask("GET", "/docs").body.decode()
    assert "422" not in page and "HTTPValidationError" not in page  # what is wrong is 400 everywhere
    assert "/v1/chat/completions" in page and not re.search(r"src=|https?://|<script", page)
