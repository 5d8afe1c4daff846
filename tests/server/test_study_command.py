"""`vllm-sae study`: the files that it takes, and what it says where it cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from server.__main__ import main
from server.commands.study import StudyFileError, read_tasks

BODY: Final[dict[str, Any]] = {"steering": {"interventions": []}}
FORECAST: Final[dict[str, Any]] = {"study": "forecast", "body": BODY}
CONTRAST: Final[dict[str, Any]] = {"study": "contrast", "sae": "org/l 1", "body": {}}


def test_file_of_one_study_is_answered_with_one_answer() -> None:
    (task,), form = read_tasks(json.dumps(FORECAST))
    assert (task.study.name, task.sae, task.body) == ("forecast", None, BODY)
    assert form([{"edits": []}]) == {"edits": []}


def test_list_is_answered_with_a_list_and_an_object_with_an_object() -> None:
    tasks, form = read_tasks(json.dumps([FORECAST, CONTRAST]))
    assert [task.path for task in tasks] == [
        "/v1/steering/forecast",
        "/v1/saes/org/l%201/contrast",
    ]
    assert form([{"a": 1}, {"b": 2}]) == [{"a": 1}, {"b": 2}]
    tasks, form = read_tasks(json.dumps({"one": FORECAST, "two": CONTRAST}))
    assert form([{"a": 1}, {"b": 2}]) == {"one": {"a": 1}, "two": {"b": 2}}


def test_route_names_study_and_sae() -> None:
    route = "/v1/saes/org/l%201/contrast"
    (task,), _ = read_tasks(json.dumps({"route": route, "body": {}}))
    assert (task.study.name, task.sae, task.path) == ("contrast", "org/l 1", route)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("5", "no study"),
        ("[]", "no study"),
        ("{}", "no study"),
        ('[{"study": "forecast"}]', "study 0: expected an object with a study and a body"),
        ('{"a": 5}', "study 'a': expected an object"),
        ('{"study": "predict", "body": {}}', "no such study; the studies are evaluate, calibrate"),
        ('{"study": ["forecast"], "body": {}}', "no such study"),
        ('{"study": "contrast", "body": {}}', "contrast needs the name of an SAE"),
        ('{"study": "forecast", "sae": "a", "body": {}}', "forecast takes no `sae`"),
        ('{"study": "forecast", "body": {}, "model": "a"}', "unknown field 'model'"),
        ('{"route": "/v1/saes/contrast", "body": {}}', "no such study"),
        ('{"route": 5, "body": {}}', "no such study"),
        ('{"route": "/v1/steering/forecast", "study": "forecast", "body": {}}', "either a route"),
    ],
)
def test_file_that_names_no_study_is_refused_in_one_line(content: str, message: str) -> None:
    with pytest.raises(StudyFileError, match=message.replace("(", r"\(")):
        read_tasks(content)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --url of a running server, or --model and --sae"),
        (("--model", "/nowhere"), "give --url of a running server, or --model and --sae"),
        (("--url", "http://127.0.0.1:1"), "http://127.0.0.1:1: "),
        (("--model", "/nowhere", "--sae", "a=/nowhere"), "/nowhere"),
    ],
)
def test_where_nothing_can_run_one_line_says_why(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(FORECAST))
    assert main(["study", str(file), *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.count("\n") == 1


def test_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "/nowhere.json", "--url", "http://127.0.0.1:1"]) == 1
    assert "/nowhere.json" in capsys.readouterr().err
