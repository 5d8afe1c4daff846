"""Presets in a folder: what is read, written, refused, and seen by a server beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sae.errors import SAEError
from server.presets.preset import MAX_DESCRIPTION
from server.presets.store import (
    LOOK_EVERY,
    MAX_PRESETS,
    PresetStore,
    fixed_presets,
)
from steering.errors import ForbiddenError, NotFoundError, SteeringError
from steering.request.parse import parse_spec


@dataclass(frozen=True)
class Facts:
    hook: str = "blocks.10.hook_resid_post"
    d_sae: int = 8
    error_term: bool = True
    affine: bool = True
    reads: str = hook
    writes: tuple[str, ...] = (hook,)

    def max_activation(self, feature: int) -> float | None:
        return None


SAES = {"l10": Facts()}
EDIT = {"interventions": [{"sae": "l10", "feature": 3, "op": "clamp", "value": 0}]}


def validate(raw: object) -> object:
    return parse_spec(raw, SAES)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def store(folder: Path | None, **facts: Any) -> PresetStore:
    made = PresetStore(validate, folder=folder, **facts)
    made.open()
    return made


def write(folder: Path, name: str, body: Mapping[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(body))
    return path


def refused(call: Any, *args: Any) -> tuple[str, str | None]:
    with pytest.raises(SteeringError) as caught:
        call(*args)
    return caught.value.code, caught.value.param


def test_file_holds_the_object_alone_or_beside_a_description(tmp_path: Path) -> None:
    write(tmp_path, "bare", EDIT)
    write(tmp_path, "told", {"steering": EDIT, "description": "less of it"})
    presets = store(tmp_path)
    assert [(p.name, p.description) for p in presets.all()] == [
        ("bare", None),
        ("told", "less of it"),
    ]
    assert presets.need("bare").steering == presets.need("told").steering == EDIT


def test_put_is_seen_by_a_server_on_the_same_folder(tmp_path: Path) -> None:
    clock = Clock()
    one, other = store(tmp_path), store(tmp_path, clock=clock)
    preset, new = one.put("calm", {"steering": EDIT, "description": "x"})
    assert new and preset.steering == EDIT
    assert other.get("calm") is None  # it has just looked
    clock.now = LOOK_EVERY
    seen = other.get("calm")
    assert seen is not None and (seen.steering, seen.description) == (EDIT, "x")
    assert not one.put("calm", EDIT)[1]
    one.delete("calm")
    assert one.get("calm") is None
    clock.now = 2 * LOOK_EVERY
    assert other.get("calm") is None


def test_put_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    store(tmp_path).put("calm", EDIT)
    assert os.listdir(tmp_path) == ["calm.json"]


def test_file_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    presets, path = store(tmp_path), tmp_path / "calm.json"
    bodies = [{"steering": EDIT, "description": letter * MAX_DESCRIPTION} for letter in "ab"]
    presets.put("calm", bodies[0])

    def replace() -> None:
        for i in range(100):
            presets.put("calm", bodies[i % 2])

    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(replace)
        while not written.done():
            assert json.loads(path.read_text())["description"] in [b["description"] for b in bodies]
        written.result()


@pytest.mark.parametrize(
    "name", ["", "a/b", "a b", "x" * 65, ".", "..", "\N{LATIN SMALL LETTER E WITH ACUTE}"]
)
def test_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    assert refused(store(tmp_path).put, name, EDIT) == ("invalid_value", "name")


def test_every_character_of_the_contract_makes_a_name(tmp_path: Path) -> None:
    name = ".Aa0_-." + "z" * 57
    assert store(tmp_path).put(name, EDIT)[0].name == name


def test_put_is_refused_as_a_request_would_be(tmp_path: Path) -> None:
    presets = store(tmp_path)
    wrong = {"interventions": [{"sae": "l10", "feature": -1, "op": "clamp", "value": 0}]}
    for body in (wrong, {"steering": wrong}):
        assert refused(presets.put, "calm", body) == (
            "feature_out_of_range",
            "steering.interventions[0].feature",
        )
    assert refused(presets.put, "calm", [1])[0] == "invalid_type"
    assert refused(presets.put, "calm", {"steering": EDIT, "nmae": 1}) == ("unknown_field", "nmae")
    assert refused(presets.put, "calm", {"steering": EDIT, "description": 3})[0] == "invalid_type"
    assert presets.all() == []


def test_without_a_folder_nothing_can_be_changed() -> None:
    presets = store(None)
    for call in (lambda: presets.put("calm", EDIT), lambda: presets.delete("calm")):
        with pytest.raises(ForbiddenError) as caught:
            call()
        assert caught.value.code == "presets_read_only"


def test_preset_of_the_command_line_cannot_be_changed(tmp_path: Path) -> None:
    fixed = fixed_presets([f"calm={write(tmp_path, 'any', EDIT)}"], validate)
    (tmp_path / "any.json").unlink()
    presets = store(tmp_path, fixed=fixed)
    assert refused(presets.put, "calm", EDIT)[0] == "presets_read_only"
    assert refused(presets.delete, "calm")[0] == "presets_read_only"
    assert presets.need("calm").fixed


def test_default_preset_cannot_be_deleted(tmp_path: Path) -> None:
    write(tmp_path, "calm", EDIT)
    presets = store(tmp_path, default="calm")
    with pytest.raises(ForbiddenError, match="steering-default"):
        presets.delete("calm")


def test_default_preset_outlives_its_file(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path, "calm", EDIT)
    presets = store(tmp_path, default="calm", clock=clock)
    path.unlink()
    clock.now = LOOK_EVERY
    assert presets.need("calm").steering == EDIT


def test_one_preset_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    for i in range(MAX_PRESETS):
        write(tmp_path, f"p{i}", EDIT)
    presets = store(tmp_path)
    assert refused(presets.put, "more", EDIT)[0] == "too_many_presets"
    presets.put("p0", EDIT)  # replacing is no growth


def test_name_of_a_served_model_is_refused(tmp_path: Path) -> None:
    assert refused(store(tmp_path, taken=lambda: ["base"]).put, "base", EDIT) == (
        "invalid_value",
        "name",
    )
    write(tmp_path, "base", EDIT)
    with pytest.raises(SAEError, match="served model"):
        store(tmp_path, taken=lambda: ["base"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ('{"interventions": []}', "interventions"),
        ('{"steering": {"interventions": [{"feature": 1}]}}', "interventions"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_wrong_file_at_start_is_one_line_that_names_it(
    tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "calm.json").write_text(content)
    with pytest.raises(SAEError, match=said) as caught:
        store(tmp_path)
    assert "calm.json" in str(caught.value) and "\n" not in str(caught.value)


def test_file_that_turns_wrong_leaves_the_preset_as_it_was(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path, "calm", EDIT)
    presets = store(tmp_path, clock=clock)
    path.write_text("{")
    clock.now = LOOK_EVERY
    assert presets.need("calm").steering == EDIT


def test_unknown_preset_is_said_so(tmp_path: Path) -> None:
    presets = store(tmp_path)
    with pytest.raises(NotFoundError):
        presets.need("calm")
    with pytest.raises(NotFoundError):
        presets.delete("calm")


def test_two_flags_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "calm", EDIT)
    with pytest.raises(SAEError, match="two presets"):
        fixed_presets([f"calm={path}", f"calm={path}"], validate)
    with pytest.raises(SAEError, match="NAME=FILE"):
        fixed_presets(["calm"], validate)
