"""Chat clients of both languages: a preset by its name, and a `steering` field."""

from __future__ import annotations

import pytest

from tests.clients.conftest import PRESET, Clients, assert_answers, python

# The first test to ask waits for the server.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.needs("main/langchain_openai")
def test_langchain_steers_by_preset_and_field_and_drops_the_report(clients: Clients) -> None:
    found = clients.program(python("main"), "langchain_chat.py")
    assert_answers(found, clients.answers(), PRESET)
    assert found["report"] is False


@pytest.mark.needs("llama-index/llama_index/llms/openai_like")
def test_llama_index_steers_by_preset_and_field_and_keeps_the_report(clients: Clients) -> None:
    found = clients.program(python("llama-index"), "llama_index_chat.py")
    assert_answers(found, clients.answers(), PRESET)
    assert found["report"] is True


@pytest.mark.needs("npm/openai")
def test_npm_sdk_steers_by_preset_and_field_and_reads_report_and_refusal(clients: Clients) -> None:
    found = clients.program("node", "openai_chat.cjs")
    assert_answers(found, clients.answers(), PRESET)
    assert found["report"] is True
    assert found["response report"] is True
    assert found["refused"] == [400, "feature_out_of_range", "steering.interventions[0].feature"]
