from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import SAEError
from sae.source import FORMATS, SAEReference, parse_source, resolve


def test_flag_with_every_option() -> None:
    ref = SAEReference.parse(
        "l15=hf://owner/repo/sub@main,hook=blocks.15.hook_mlp_out,format=gemma_scope,sink_norm=2000"
    )
    assert ref == SAEReference(
        name="l15",
        source="hf://owner/repo/sub@main",
        hook="blocks.15.hook_mlp_out",
        format="gemma_scope",
        sink_norm=2000.0,
    )


def test_a_path_may_hold_commas_and_equals_signs() -> None:
    assert SAEReference.parse("a=/data/x=1,2/sae").source == "/data/x=1,2/sae"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("/just/a/path", "expected NAME=SOURCE"),
        ("=/path", "the name ''"),
        ("a b=/path", "the name 'a b'"),
        ("a/b=/path", "the name 'a/b'"),
        ("a=", "the source is empty"),
        ("a=/path,device=cpu", "unknown option 'device', expected hook, format, sink_norm"),
        ("a=/path,hook=blocks.1.hook_resid_post,hook=blocks.2.hook_resid_post", "given twice"),
        ("a=/path,hook=layer3", "unknown hook point 'layer3'"),
        ("a=/path,format=pickle", "unknown format 'pickle'"),
        ("a=/path,sink_norm=0", "positive finite number, got '0'"),
        ("a=/path,sink_norm=-3", "positive finite number"),
        ("a=/path,sink_norm=nan", "positive finite number"),
        ("a=/path,sink_norm=inf", "positive finite number"),
        ("a=/path,sink_norm=loud", "positive finite number, got 'loud'"),
        ("a=/path,sink_norm=", "positive finite number"),
    ],
)
def test_flag_that_says_something_wrong_is_refused(flag: str, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        SAEReference.parse(flag)


@given(
    st.builds(
        SAEReference,
        name=st.just("l15"),
        source=st.text(min_size=1),
        hook=st.none() | st.just("blocks.1.hook_resid_pre"),
        format=st.none() | st.sampled_from(FORMATS),
        sink_norm=st.none() | st.floats(min_value=0.001, max_value=1e9),
        path=st.none() | st.text(),
    )
)
def test_reference_survives_json(ref: SAEReference) -> None:
    assert SAEReference.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref


@given(st.text(max_size=60))
def test_any_flag_parses_or_is_refused_in_one_line(flag: str) -> None:
    try:
        ref = SAEReference.parse(flag)
    except SAEError as error:
        assert "\n" not in str(error)
    else:
        assert ref.name
        assert ref.source


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/smollm2-135m-l14/", "smollm2-135m-l14"),
        ("hf://owner/repo@v1", "repo"),
        ("sae_lens://release/blocks.8", "blocks.8"),
        ("/", "sae"),
    ],
)
def test_name_of_an_unnamed_source_is_its_last_part(source: str, name: str) -> None:
    assert parse_source(source).name == name


def test_unnamed_source_takes_the_same_options() -> None:
    ref = parse_source("/data/x.pt,hook=blocks.1.hook_resid_post")
    assert (ref.name, ref.source, ref.hook) == ("x.pt", "/data/x.pt", "blocks.1.hook_resid_post")


def test_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert resolve(SAEReference.parse("a=mine")).path == str(tmp_path / "mine")


def test_missing_local_path_is_refused() -> None:
    with pytest.raises(SAEError, match="/no/such/folder: no such file or folder"):
        resolve(SAEReference.parse("a=/no/such/folder"))
