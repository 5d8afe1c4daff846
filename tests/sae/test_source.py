from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.errors import SAEError
from sae.layers import resolve_all
from sae.registry import RegistryFacts
from sae.source import FORMATS, ResolvedSAE, SAEReference, parse_source, resolve


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


def test_flag_of_a_layer_and_of_a_transcoder_s_places() -> None:
    assert SAEReference.parse("t=/path,layer=15").layer == 15
    assert SAEReference.parse("t=/path,layer=all").layer == "all"
    ref = SAEReference.parse(
        "t=/path,reads=model.layers.3.mlp.input,writes=blocks.3.ln2_post.hook_out"
    )
    assert (ref.reads, ref.writes) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")


def test_source_of_several_is_not_resolved_as_one(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="layer=all stands for several; name one, as layer=3"):
        resolve(SAEReference.parse(f"t={tmp_path},layer=all"))


def test_a_path_may_hold_commas_and_equals_signs() -> None:
    assert SAEReference.parse("a=/data/x=1,2/sae").source == "/data/x=1,2/sae"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("/just/a/path", "expected NAME=SOURCE"),
        ("=/path", "the name ''"),
        ("a b=/path", "the name 'a b'"),
        (".=/path", "the name '.'"),
        ("..=/path", "the name '..'"),
        ("a/b=/path", "the name 'a/b'"),
        ("a=", "the source is empty"),
        ("a=/path,device=cpu", "unknown option 'device', expected hook, format, sink_norm"),
        ("a=/path,hook=blocks.1.hook_resid_post,hook=blocks.2.hook_resid_post", "given twice"),
        ("a=/path,hook=layer3", "unknown hook point 'layer3'"),
        ("a=/path,format=pickle", "unknown format 'pickle'"),
        ("a=/path,layer=-1", "layer must be a number from 0, or all, got '-1'"),
        ("a=/path,layer=every", "layer must be a number from 0, or all"),
        ("a=/path,reads=x", "reads=x: unknown hook point 'x'"),
        (
            "a=/path,hook=blocks.1.hook_resid_post,writes=blocks.1.hook_mlp_out",
            "state one or the other",
        ),
        ("a=/path,sink_norm=0", "positive finite number, got '0'"),
        ("a=/path,sink_norm=-3", "positive finite number"),
        ("a=/path,sink_norm=nan", "positive finite number"),
        ("a=/path,sink_norm=inf", "positive finite number"),
        ("a=/path,sink_norm=loud", "positive finite number, got 'loud'"),
        ("a=/path,sink_norm=", "positive finite number"),
        ("a=/path,sink_norm=1_000", "'/path,sink_norm=1_000': sink_norm must be a positive"),
        ("a=/path,sink_norm= 5 ", "positive finite number, got ' 5 '"),
        ("a=/path,sink_norm=٣", "positive finite number, got '٣'"),
        ("a=/path,sink_norm=1e999", "positive finite number, got '1e999'"),
    ],
)
def test_flag_that_says_something_wrong_is_refused(flag: str, message: str) -> None:
    with pytest.raises(SAEError, match=message):
        SAEReference.parse(flag)


@pytest.mark.parametrize("text", ["2000", "2e3", "2.0E+3", "+2000.", "2000.000"])
def test_sink_norm_is_a_decimal_number(text: str) -> None:
    assert SAEReference.parse(f"a=/path,sink_norm={text}").sink_norm == 2000.0


def test_what_reads_like_an_option_is_part_of_a_path_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a,lr=1,hook=x,k=5").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (str(tmp_path), "~"):
        ref = SAEReference.parse(f"l3={folder}/a,lr=1,hook=x,k=5,sink_norm=7")
        assert (ref.source, ref.hook) == (f"{folder}/a,lr=1,hook=x,k=5", None)
        assert ref.sink_norm == 7.0
    with pytest.raises(SAEError, match="unknown option 'lr'"):
        SAEReference.parse(f"l3={tmp_path}/a,lr=1,k=5")


@given(
    st.builds(
        ResolvedSAE,
        name=st.just("l15"),
        source=st.text(min_size=1),
        path=st.text(),
        hook=st.none() | st.just("blocks.1.hook_resid_pre"),
        format=st.none() | st.sampled_from(FORMATS),
        sink_norm=st.none() | st.floats(min_value=0.001, max_value=1e9),
        facts=st.builds(
            RegistryFacts,
            norm_scaling_factor=st.none() | st.floats(min_value=0.001, max_value=1e9),
            center_writing_weights=st.booleans(),
            model=st.none() | st.text(),
        ),
    )
)
def test_resolved_reference_survives_json(ref: ResolvedSAE) -> None:
    assert ResolvedSAE.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref


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


@pytest.mark.parametrize(
    ("source", "message"),
    [("~nosuchuser/x", "home directory"), ("/tmp/" + "x" * 300, "File name too long")],
)
def test_path_that_cannot_be_looked_up_is_refused(source: str, message: str) -> None:
    for stated in ("", ",layer=all"):
        with pytest.raises(SAEError, match=rf"^{source}: .*{message}"):
            resolve_all(SAEReference.parse(f"a={source}{stated}"))


def test_missing_local_path_is_refused() -> None:
    with pytest.raises(SAEError, match="/no/such/folder: no such file or folder"):
        resolve(SAEReference.parse("a=/no/such/folder"))


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("https://huggingface.co/owner/repo", "hf://owner/repo"),
        ("http://huggingface.co/owner/repo/", "hf://owner/repo"),
        ("https://huggingface.co/owner/repo/tree/main", "hf://owner/repo"),
        ("https://huggingface.co/owner/repo/tree/main/a/b", "hf://owner/repo/a/b"),
        ("https://hf.co/owner/repo/blob/v1/a/ae.pt?download=true", "hf://owner/repo/a/ae.pt@v1"),
        ("huggingface.co/owner/repo/tree/main/a", "hf://owner/repo/a"),
        ("owner/repo", "hf://owner/repo"),
        ("owner/repo/folder", "hf://owner/repo/folder"),
    ],
)
def test_place_on_the_hub_is_refused_with_what_to_write(source: str, written: str) -> None:
    with pytest.raises(SAEError) as caught:
        resolve(SAEReference.parse(f"a={source}"))
    assert str(caught.value).startswith(source)
    assert f"write {written}" in f"{caught.value} "


@pytest.mark.parametrize("source", ["./owner/repo", "/owner/repo", "repo", "../a/b"])
def test_path_that_is_no_repository_is_only_missing(source: str) -> None:
    with pytest.raises(SAEError, match=r"no such file or folder$"):
        resolve(SAEReference.parse(f"a={source}"))


@pytest.mark.parametrize(
    ("written", "hook"),
    [
        ("model.layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.3.mlp", "blocks.3.mlp.hook_out"),
        ("blocks.3.hook_resid_mid", "blocks.3.hook_resid_mid"),
        ("blocks.3.ln2_post.hook_out", "blocks.3.hook_mlp_out"),
    ],
)
def test_hook_may_be_written_in_any_vocabulary(written: str, hook: str) -> None:
    assert SAEReference.parse(f"a=/path,hook={written}").hook == hook
