"""`hf://` and `sae_lens://` sources, against a hub on this machine, in processes of their own: the
hub's client reads its environment when it is imported."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae import registry as registry_module
from sae.errors import SAEError
from sae.hub import HubAddress
from sae.registry import RegistryFacts, find, find_on_disk, look_up
from sae.sae import open_sae
from sae.source import ResolvedSAE
from tests.sae.fake_hub import COMMIT, FakeHub, serve
from tests.sae.oracles import oracle
from tests.sae.other_suites import LAYERS, write_circuit_tracer_clt
from tests.sae.resolving import Resolving, resolving
from tests.sae.suites import (
    HOOK,
    sae_lens_config,
    write_llama_scope,
    write_qwen_scope,
    write_sae_lens,
    write_sparsify,
)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def processes() -> Iterator[Resolving]:
    with resolving() as running:
        yield running


@pytest.fixture
def answers(
    processes: Resolving, hub: FakeHub, tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Resolve sources in one process whose hub is the fake one: references, or refusals."""

    def run(*sources: str, site: str = "", **environment: str) -> list[dict[str, Any]]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return processes.answers(sources, kept | settings | environment, [site] if site else [])

    return run


@pytest.fixture
def resolve(answers: Callable[..., list[dict[str, Any]]]) -> Callable[..., ResolvedSAE]:
    """Resolve one source so; SAEError if it is refused."""

    def run(source: str, **environment: str) -> ResolvedSAE:
        (answer,) = answers(source, **environment)
        if "refused" in answer:
            raise SAEError(answer["refused"])
        return ResolvedSAE.from_dict(answer)

    return run


Resolve = Callable[..., ResolvedSAE]


@pytest.fixture
def suite(hub: FakeHub, tmp_path: Path) -> Path:
    """A repository of three SAEs in folders, with things that nobody needs."""
    root = tmp_path / "owner" / "suite"
    for layer in (3, 4, 5):
        folder = write_sae_lens(
            root / f"blocks.{layer}",
            config=sae_lens_config(metadata={"hook_name": f"blocks.{layer}.hook_resid_post"}),
        )
        (folder / "features.jsonl").write_text('{"index": 0, "label": "a"}\n')
        (folder / "sparsity.safetensors").write_bytes(b"not needed")
        (folder / "runner_cfg.json").write_text("{}")
    (root / "README.md").write_text("three SAEs")
    hub.repos["owner/suite"] = hub.repos["owner/other"] = root
    return root


def test_only_the_files_of_one_sae_are_fetched(hub: FakeHub, suite: Path, resolve: Resolve) -> None:
    ref = resolve("hf://owner/suite/blocks.4")
    assert hub.downloaded == {
        "blocks.4/cfg.json",
        "blocks.4/features.jsonl",
        "blocks.4/sae_weights.safetensors",
    }
    card = open_sae(ref).card
    assert (card.hook, card.source) == ("blocks.4.hook_resid_post", "hf://owner/suite/blocks.4")
    assert card.has_labels


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_revision_is_pinned_to_a_commit(suite: Path, resolve: Resolve, revision: str) -> None:
    ref = resolve(f"hf://owner/suite/blocks.4@{revision}")
    assert f"/snapshots/{COMMIT}/blocks.4/" in str(ref.path)


def test_repository_that_changes_meanwhile_is_refused(
    hub: FakeHub, suite: Path, resolve: Resolve
) -> None:
    hub.moved_to = "f" * 40
    with pytest.raises(SAEError, match="changed while it was fetched; try again"):
        resolve("hf://owner/suite/blocks.4")


def test_second_resolution_fetches_nothing_again(
    hub: FakeHub, suite: Path, resolve: Resolve
) -> None:
    first = resolve("hf://owner/suite/blocks.4")
    hub.requests.clear()
    assert resolve("hf://owner/suite/blocks.4") == first
    assert hub.downloaded == set()


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_cache_answers_where_the_hub_does_not(
    suite: Path, resolve: Resolve, environment: dict[str, str]
) -> None:
    for address in ("blocks.4", "blocks.4/sae_weights.safetensors"):
        online = resolve(f"hf://owner/suite/{address}@v1")
        assert resolve(f"hf://owner/suite/{address}@{COMMIT}", **environment).path == online.path
    with pytest.raises(SAEError, match="cannot be reached and the files are not in the cache"):
        resolve("hf://owner/suite/blocks.4@v2", **environment)
    with pytest.raises(SAEError, match="no weight file in it"):
        resolve(f"hf://owner/suite/blocks.5@{COMMIT}", **environment)


def test_branch_is_found_in_the_cache_by_its_name(suite: Path, resolve: Resolve) -> None:
    online = resolve("hf://owner/suite/blocks.4")
    assert resolve("hf://owner/suite/blocks.4", HF_HUB_OFFLINE="1").path == online.path


def test_empty_cache_without_a_hub_is_refused(resolve: Resolve) -> None:
    with pytest.raises(SAEError, match="cannot be reached and the files are not in the cache"):
        resolve("hf://owner/suite/blocks.4", HF_HUB_OFFLINE="1")


def test_repository_of_many_saes_asks_for_one_before_fetching(
    hub: FakeHub, tmp_path: Path, resolve: Resolve
) -> None:
    root = write_qwen_scope(tmp_path).parent
    shutil.copy(root / "layer3.sae.pt", root / "layer7.sae.pt")
    hub.repos[f"Qwen/{root.name}"] = root
    with pytest.raises(SAEError, match=r"a set of 2 layers \(3, 7\); state which, as .*,layer=3"):
        resolve(f"hf://Qwen/{root.name}")
    assert hub.downloaded == set()
    card = open_sae(resolve(f"hf://Qwen/{root.name}/layer7.sae.pt")).card
    assert (card.format, card.k, card.layer) == ("qwen_scope", 5, 7)
    assert hub.downloaded == {"layer7.sae.pt"}
    assert resolve(f"hf://Qwen/{root.name},layer=3").path.endswith("/layer3.sae.pt")


def test_every_layer_of_a_set_is_fetched_with_what_describes_it(
    hub: FakeHub, tmp_path: Path, answers: Callable[..., list[dict[str, Any]]]
) -> None:
    hub.repos["owner/set"] = write_circuit_tracer_clt(tmp_path / "set")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = answers("hf://owner/set,layer=all", **environment)
        cards = [open_sae(ResolvedSAE.from_dict(each)).card for each in found]
        assert [card.id for card in cards] == [f"l3.{layer}" for layer in range(LAYERS)]
        assert [len(card.writes) for card in cards] == [*range(LAYERS, 0, -1)]
    files = {f"W_{half}_{layer}.safetensors" for half in ("enc", "dec") for layer in range(LAYERS)}
    assert hub.downloaded == files | {"config.yaml"}


def test_weights_in_a_checkpoints_folder_come_with_their_configuration(
    hub: FakeHub, tmp_path: Path, resolve: Resolve
) -> None:
    folder = write_llama_scope(tmp_path / "repo")
    (folder / "features.jsonl").write_text('{"index": 0, "label": "a"}\n')
    hub.repos["fnlp/suite"] = folder.parent
    for path in (folder.name, f"{folder.name}/checkpoints/final.safetensors"):
        card = open_sae(resolve(f"hf://fnlp/suite/{path}")).card
        assert (card.format, card.hook, card.has_labels) == ("llama_scope", HOOK, True)


@pytest.fixture
def folders_like_files(hub: FakeHub, tmp_path: Path) -> Path:
    """A repository whose folders are called as weight files are, beside a weight file."""
    root = tmp_path / "owner" / "v5"
    for path in ("layer_3.pt", "ae.pt", "deeper/layer_3.pt"):
        write_sae_lens(root / path)
    shutil.copy(root / "ae.pt" / "sae_weights.safetensors", root / "lone.safetensors")
    hub.repos["owner/v5"] = root
    return root


@pytest.mark.parametrize(
    ("path", "listed"),
    [("layer_3.pt", ["", "layer_3.pt"]), ("deeper/layer_3.pt", ["deeper", "deeper/layer_3.pt"])],
)
def test_folder_called_like_a_weight_file_is_a_folder_here_and_in_the_cache(
    hub: FakeHub, folders_like_files: Path, resolve: Resolve, path: str, listed: list[str]
) -> None:
    source = f"hf://owner/v5/{path}"
    ref = resolve(source)
    assert str(ref.path).endswith(f"/snapshots/{COMMIT}/{path}/sae_weights.safetensors")
    assert open_sae(ref).card.hook == HOOK
    assert hub.listed == listed
    assert hub.downloaded == {f"{path}/cfg.json", f"{path}/sae_weights.safetensors"}
    assert resolve(source, HF_HUB_OFFLINE="1").path == ref.path
    for online in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert resolve(f"{source}/sae_weights.safetensors", **online).path == ref.path


def test_folder_is_no_weight_file_of_the_folder_around_it(
    hub: FakeHub, folders_like_files: Path, resolve: Resolve
) -> None:
    for source in ("hf://owner/v5", "hf://owner/v5/lone.safetensors"):
        assert str(resolve(source).path).endswith(f"/snapshots/{COMMIT}/lone.safetensors")
    assert hub.downloaded == {"lone.safetensors"}
    (folders_like_files / "lone.safetensors").unlink()
    with pytest.raises(SAEError, match=r"no weight file in it .*; it holds ae\.pt/, deeper/, "):
        resolve("hf://owner/v5")


def test_plain_names_are_decided_by_one_listing(
    hub: FakeHub, suite: Path, answers: Callable[..., list[dict[str, Any]]]
) -> None:
    answers("hf://owner/suite/blocks.4", "hf://owner/suite/blocks.5/sae_weights.safetensors")
    assert hub.listed == ["blocks.4", "blocks.5"]


def test_folder_name_survives_the_cache(hub: FakeHub, tmp_path: Path, resolve: Resolve) -> None:
    hub.repos["eleuther/sae"] = write_sparsify(tmp_path / "repo", module="layers.23.mlp").parent
    card = open_sae(resolve("hf://eleuther/sae/layers.23.mlp")).card
    assert card.hook == "blocks.23.mlp.hook_out"


def test_source_that_is_not_there_is_refused_in_one_line(
    hub: FakeHub, suite: Path, answers: Callable[..., list[dict[str, Any]]]
) -> None:
    hub.gated.add("owner/gated")
    refusals = {
        "hf://owner/nothing": "no such repository, or a private one",
        "hf://owner/suite/blocks.4@v9": "no revision 'v9'",
        "hf://owner/suite/blocks.9": "no folder 'blocks.9'",
        "hf://owner/suite/blocks.4/other.safetensors": "no file 'blocks.4/other.safetensors'",
        "hf://owner/suite": "no weight file in it",
        "hf://owner/gated": "access is gated",
        "hf://owner": "expected hf://OWNER/REPO",
        "hf://owner/suite@": "expected hf://OWNER/REPO",
        "hf://owner/suite/../other": "'../other' is not a path in a repository",
        "hf://owner/-bad-": "hf://owner/-bad-",
        "s3://bucket/key": "unknown scheme, expected a path, hf:// or sae_lens://",
        "sae_lens://release": "expected sae_lens://RELEASE/SAE_ID",
    }
    for (source, message), answer in zip(refusals.items(), answers(*refusals), strict=True):
        assert message in answer["refused"], source
        assert "\n" not in answer["refused"]
    assert hub.downloaded == set()


@pytest.mark.parametrize(
    ("source", "address"),
    [
        ("hf://a/b", HubAddress("a/b")),
        ("hf://a/b/", HubAddress("a/b")),
        ("hf://a/b/c/d.e@refs/pr/1", HubAddress("a/b", "c/d.e", "refs/pr/1")),
        ("hf://a/b/c/@v1", HubAddress("a/b", "c", "v1")),
        ("hf://a/b/c/checkpoints/final.safetensors", HubAddress("a/b", "c")),
        (
            "hf://a/b/mycheckpoints/final.safetensors",
            HubAddress("a/b", "mycheckpoints/final.safetensors"),
        ),
        ("hf://a/b/checkpoints/final.safetensors", HubAddress("a/b")),
    ],
)
def test_addresses_of_the_hub(source: str, address: HubAddress) -> None:
    assert HubAddress.parse(source) == address


REGISTRY = """
suite-res:
  repo_id: owner/suite
  model: tiny
  conversion_func: null
  config_overrides: {normalize_activations: expected_average_only_in}
  saes:
  - {id: layer/4, path: blocks.4, norm_scaling_factor: 0.5}
  - {id: layer/5, path: blocks.5}
suite-v5:
  repo_id: owner/v5
  model: tiny
  conversion_func: null
  saes: [{id: blocks.3.hook_resid_post, path: layer_3.pt}]
centered:
  repo_id: owner/other
  model: gpt2-small
  conversion_func: null
  config_overrides: {model_from_pretrained_kwargs: {center_writing_weights: true}}
  saes: [{id: blocks.3.hook_resid_post, path: blocks.3}]
suite-temporal:
  repo_id: owner/suite
  model: tiny
  conversion_func: temporal
  saes: [{id: a, path: b}]
"""


@pytest.mark.parametrize("source", ["hf://owner/suite/blocks.4", "sae_lens://suite-res/layer/4"])
def test_facts_of_the_registry_hold_however_an_sae_is_named(
    suite: Path, resolve: Resolve, registry: dict[str, str], source: str, tmp_path: Path
) -> None:
    ref = resolve(source, **registry)
    assert ref.facts.norm_scaling_factor == 0.5
    # The file itself, its place in the hub's cache, and a copy under the repository's name.
    same = (f"{source}/sae_weights.safetensors",) if source.startswith("hf") else ()
    copy = tmp_path / "copies" / "suite" / "blocks.4"
    shutil.copytree(suite / "blocks.4", copy)
    for other in (*same, ref.path, str(Path(ref.path).parent), str(copy)):
        assert resolve(other, **registry).facts == ref.facts, other
    assert resolve("hf://owner/suite/blocks.3", **registry).facts == RegistryFacts()
    assert resolve(str(suite / "blocks.3"), **registry).facts == RegistryFacts()


def test_centered_weights_are_told_by_the_registry(
    suite: Path, resolve: Resolve, registry: dict[str, str]
) -> None:
    plain = open_sae(resolve("hf://owner/suite/blocks.3"))
    for source in ("hf://owner/other/blocks.3", "sae_lens://centered/blocks.3.hook_resid_post"):
        ref = resolve(source, **registry)
        assert ref.facts.center_writing_weights
        rows = plain.rows([3]).W_enc
        centered = rows - rows.mean(dim=1, keepdim=True)
        assert (open_sae(ref).rows([3]).W_enc == centered).all()


@pytest.mark.parametrize(
    "source",
    [
        "hf://owner/lorsa/layer_3",
        "hf://ByteDance-Seed/clt-qwen3-8b/layer_3",
        "hf://owner/tracer",
        "hf://owner/tracer,layer=7",
        "hf://owner/set/W_dec_0.safetensors",
        "hf://owner/shards",
        "sae_lens://suite-temporal/a",
    ],
)
def test_nothing_is_downloaded_that_names_rule_out(
    hub: FakeHub, tmp_path: Path, resolve: Resolve, registry: dict[str, str], source: str
) -> None:
    listings = {
        "owner/tracer": ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"],
        "owner/set": ["W_enc_0.safetensors", "W_dec_0.safetensors", "config.json"],
        "owner/shards": ["sae-00001-of-00002.safetensors", "sae-00002-of-00002.safetensors"],
    }
    for repo, names in listings.items():
        hub.repos[repo] = tmp_path / repo
        hub.repos[repo].mkdir(parents=True)
        for name in names:
            (hub.repos[repo] / name).write_bytes(b"not to be fetched")
    with pytest.raises(SAEError, match=r"attends|ByteDance|a set of 2|no layer 7|decoder|shards"):
        resolve(source, **registry)
    assert hub.requests == []


def test_run_of_sparsify_comes_with_its_folder(
    hub: FakeHub, tmp_path: Path, resolve: Resolve
) -> None:
    root = write_sparsify(tmp_path / "repo", module="layers.3.mlp", transcode=None).parent
    hub.repos["eleuther/run"] = root
    (root / "config.json").write_text('{"transcode": true}')
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        card = open_sae(resolve("hf://eleuther/run/layers.3.mlp", **environment)).card
        assert (card.kind, card.reads) == ("transcoder", "blocks.3.mlp.hook_in")


def test_factor_of_a_checkpoint_is_fetched(hub: FakeHub, suite: Path, resolve: Resolve) -> None:
    (suite / "blocks.4" / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    with pytest.raises(SAEError, match=r"activation_scaler\.json: scaling_factor is 0\.5"):
        open_sae(resolve("hf://owner/suite/blocks.4"))


@pytest.fixture
def registry(tmp_path: Path) -> dict[str, str]:
    """Where a `sae_lens` lies whose import fails, and a registry in it."""
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('slow and not needed')")
    (package / "pretrained_saes.yaml").write_text(REGISTRY)
    return {"site": str(package.parent)}


def test_registry_names_the_repository_and_the_factor_to_fold(
    suite: Path, resolve: Resolve, registry: dict[str, str]
) -> None:
    ref = resolve("sae_lens://suite-res/layer/4", **registry)
    assert f"/snapshots/{COMMIT}/blocks.4/sae_weights.safetensors" in str(ref.path)
    assert ref.facts.norm_scaling_factor == 0.5
    unscaled = open_sae(resolve("hf://owner/suite/blocks.4"))
    scaled = open_sae(ref)
    assert (scaled.rows([3]).W_enc == unscaled.rows([3]).W_enc * 0.5).all()
    assert scaled.card.source == "sae_lens://suite-res/layer/4"


def test_registry_without_a_factor_folds_nothing(
    suite: Path, resolve: Resolve, registry: dict[str, str]
) -> None:
    ref = resolve("sae_lens://suite-res/layer/5", **registry)
    assert (open_sae(ref).rows([3]).W_enc == open_sae(
        resolve("hf://owner/suite/blocks.5")).rows([3]).W_enc).all()  # fmt: skip


def test_registry_may_name_a_folder_that_is_called_like_a_weight_file(
    folders_like_files: Path, resolve: Resolve, registry: dict[str, str]
) -> None:
    ref = resolve("sae_lens://suite-v5/blocks.3.hook_resid_post", **registry)
    assert open_sae(ref).card.hook == HOOK


def test_unknown_registry_name_is_refused_with_the_nearest(
    answers: Callable[..., list[dict[str, Any]]], registry: dict[str, str]
) -> None:
    refusals = {
        "sae_lens://suite-rse/layer/4": "no release 'suite-rse'; nearest: suite-res",
        "sae_lens://suite-res/layer/6": "no SAE 'layer/6' in suite-res; nearest: layer/",
        "sae_lens://suite-temporal/a": "reads it with temporal, which has no counterpart",
    }
    found = answers(*refusals, **registry)
    for message, answer in zip(refusals.values(), found, strict=True):
        assert message in answer["refused"]


def test_registry_of_a_package_that_is_missing_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    look_up_again = look_up.__globals__["_registry"].__wrapped__
    monkeypatch.setitem(look_up.__globals__, "_registry", look_up_again)
    with pytest.raises(SAEError, match="pip install sae-lens"):
        look_up("sae_lens://gpt2-small-res-jb/blocks.0.hook_resid_pre")


@pytest.mark.slow
def test_real_registry_agrees_with_sae_lens() -> None:
    directory = oracle("sae_lens.loading.pretrained_saes_directory", "sae-lens")
    releases = {
        "gemma-scope-2b-pt-res-canonical": "layer_12/width_16k/canonical",
        "llama_scope_lxr_8x": "l15r_8x",
        "gemma-2b-res-jb": "blocks.12.hook_resid_post",
        "mistral-7b-res-wg": "blocks.8.hook_resid_pre",
    }
    for release, sae_id in releases.items():
        entry = look_up(f"sae_lens://{release}/{sae_id}")
        assert (entry.repo, entry.path) == directory.get_repo_id_and_folder_name(release, sae_id)
        assert entry.facts.norm_scaling_factor == directory.get_norm_scaling_factor(release, sae_id)
    assert entry.facts.normalize_activations == "constant_norm_rescale"


@pytest.mark.parametrize(
    ("repo", "path", "facts"),
    [
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            "blocks.8.hook_resid_pre",
            {"center_writing_weights": True},
        ),
        (
            "jbloom/Gemma-2b-Residual-Stream-SAEs",
            "gemma_2b_blocks.12.hook_resid_post_16384",
            {"norm_scaling_factor": 0.21381938399317255},
        ),
        (
            "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
            "mistral_7b_layer_8",
            {"normalize_activations": "constant_norm_rescale"},
        ),
    ],
)
def test_real_registry_is_asked_by_place(repo: str, path: str, facts: dict[str, Any]) -> None:
    oracle("sae_lens", "sae-lens")
    on_disk = Path("/data", repo.rpartition("/")[2], path)
    cached = Path("/hf", f"models--{repo.replace('/', '--')}", "snapshots", COMMIT, path)
    found = (find(repo, path), find_on_disk(on_disk), find_on_disk(cached / "x.safetensors"))
    for entry in found:
        assert entry is not None
        assert {name: getattr(entry.facts, name) for name in facts} == facts
    assert find_on_disk(Path("/data/elsewhere", path)) is None


def test_real_registry_tells_what_can_be_served_before_a_download() -> None:
    """Of its entries only those are refused that attend over the sequence."""
    oracle("sae_lens", "sae-lens")
    counts: Counter[str] = Counter()
    for release, values in registry_module._registry().items():
        for sae in values["saes"]:
            try:
                look_up(f"sae_lens://{release}/{sae['id']}")
            except SAEError as error:
                assert "temporal" in str(error)
                counts["temporal"] += 1
            else:
                counts["taken"] += 1
    # Of SAELens 6.54; a later registry has more of each.
    assert counts["taken"] >= 13_854
    assert 3 <= counts["temporal"] <= 0.001 * counts["taken"]
