"""The recipe at other places than the stream: transcoders of an MLP, SAEs of attention's heads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.card import HEADS, HookPoint
from sae.errors import SAEError
from sae.sae import SAE, open_sae
from sae.source import SAEReference
from sae.training import activations, corpus, evaluate
from sae.training import train as training
from sae.training.model_hooks import caught, watch
from sae.training.texts import Document
from sae.training.train import Recipe, export, train, train_transcoder
from tests.models import D_MODEL, make_tiny_model

READS, WRITES = HookPoint(1, "mlp.hook_in"), HookPoint(1, "hook_mlp_out")
Z = HookPoint(1, HEADS)
STREAM = HookPoint(1, "hook_resid_post")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nine")


def opened(folder: Path) -> SAE:
    return open_sae(SAEReference("sae", str(folder)))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def work(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with what passes three places of layer 1 on a few documents."""
    folder = tmp_path_factory.mktemp("work")
    for name, seed in (("corpus", 1), ("held_out", 2)):
        chance = torch.Generator().manual_seed(seed)
        order = torch.randint(len(WORDS), (12, 120), generator=chance)
        every = [
            Document("english", "a", " ".join(WORDS[i] for i in row)) for row in order.tolist()
        ]
        corpus.write(folder / f"{name}.jsonl", every)
        activations.write(model.model, tokenizer, [READS, WRITES, Z], folder, name)
    return folder


# Hook points in transformers


def test_what_is_caught_is_what_the_modules_take_and_give(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = HookPoint(1, "hook_resid_pre")
    x, y, z, pre, post = caught(
        model.model.layers, [READS, WRITES, Z, before, STREAM], lambda: model(input_ids=ids)
    )
    layer = model.model.layers[1]
    with torch.no_grad():
        middle = pre + layer.self_attn.o_proj(z)
        assert torch.allclose(layer.post_attention_layernorm(middle), x, atol=1e-5)
        assert torch.allclose(layer.mlp(x), y, atol=1e-5)
        assert torch.allclose(middle + y, post, atol=1e-5)


def test_behind_a_norm_of_its_own_an_mlp_writes_what_the_norm_gives(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gemma: Any = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path, "gemma2")).eval()
    own = HookPoint(1, "mlp.hook_out")
    ids = torch.tensor([[5, 6, 7]])
    x, module, y = caught(gemma.model.layers, [READS, own, WRITES], lambda: gemma(input_ids=ids))
    layer = gemma.model.layers[1]
    with torch.no_grad():
        assert torch.allclose(layer.mlp(x), module, atol=1e-5)
        assert torch.allclose(layer.post_feedforward_layernorm(module), y, atol=1e-5)
    assert not torch.allclose(module, y, atol=1e-2)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (HookPoint(4, "hook_resid_post"), "layers 0 to 3"),
        (HookPoint(1, "ln2.hook_normalized"), "expected a hook point of kind hook_resid_pre, "),
    ],
)
def test_a_place_that_the_recipe_does_not_know_is_refused(
    model: Any, point: HookPoint, message: str
) -> None:
    with pytest.raises(SAEError, match=message):
        watch(model.model.layers, point, lambda x: x)


def test_a_layer_without_the_module_is_refused() -> None:
    with pytest.raises(SAEError, match=r"layers have no self_attn\.o_proj"):
        watch([torch.nn.Linear(1, 1)], HookPoint(0, HEADS), lambda x: x)


# Records


def test_sinks_are_left_out_of_the_stream_alone() -> None:
    assert activations.sink_norm(STREAM) == activations.SINK_NORM
    assert [activations.sink_norm(point) for point in (READS, WRITES, Z)] == [None] * 3


def test_rows_of_two_places_are_of_the_same_tokens(model: Any, work: Path) -> None:
    x, y = activations.stored_pairs(work, "held_out", READS, WRITES)
    assert x.shape == y.shape == (len(x), D_MODEL)
    assert activations.stored(work, "held_out", Z).shape == (len(x), 4 * 32)
    with torch.no_grad():
        expected = model.model.layers[1].mlp(x.float())
    assert torch.allclose(y.float(), expected, rtol=0.05, atol=0.05)


def test_rows_of_different_tokens_are_no_pairs(work: Path, tmp_path: Path) -> None:
    for point, count in ((READS, 3), (WRITES, 2)):
        (tmp_path / f"corpus.{point}.places").write_bytes(bytes(8 * count))
    with pytest.raises(ValueError, match="are of different tokens; record both in one run"):
        activations.stored_pairs(tmp_path, "corpus", READS, WRITES)


# Training


def sparse_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y far from zero, both sums of a few of 16 directions, and y of x itself too."""
    chance = torch.Generator().manual_seed(0)
    shown = torch.rand(count, 16, generator=chance) < 0.15
    f = shown * (1 + torch.rand(count, 16, generator=chance))
    into, out = (
        torch.nn.functional.normalize(torch.randn(16, D_MODEL, generator=chance)) for _ in range(2)
    )
    mean = 5 * torch.randn(2, D_MODEL, generator=chance)
    x = 3 * (f @ into) + mean[0]
    linear = torch.randn(D_MODEL, D_MODEL, generator=chance) / 16
    return x.bfloat16(), (20 * (f @ out) + x @ linear + mean[1]).bfloat16()


@pytest.mark.parametrize("skip", [False, True])
def test_a_trained_transcoder_is_exported_and_computes_here_what_sae_lens_does(
    tmp_path: Path, skip: bool
) -> None:
    from sae_lens import SAE as LensSAE

    x, y = sparse_pairs(6000)
    recipe = Recipe(d_sae=64, k=4, tokens=128 * 150, batch=128, learning_rate=3e-3, dead_after=20)
    places = {"hook_name": str(READS), "hook_name_out": str(WRITES)}
    trained = train_transcoder(x, y, recipe, skip=skip)
    export(trained, tmp_path / "sae", {"model_name": "tiny", **places})

    transcoder = opened(tmp_path / "sae")
    card = transcoder.card
    assert (card.kind, card.architecture, card.format) == ("transcoder", "jumprelu", "sae_lens")
    assert (card.reads, card.writes, card.sink_norm) == (str(READS), (str(WRITES),), None)
    assert ("W_skip" in load_file(tmp_path / "sae" / "sae_weights.safetensors")) is skip
    figures = evaluate.reconstruction(transcoder, x, y)
    assert figures.fvu < 0.3
    assert 1 < figures.l0 < 12

    lens = LensSAE.load_from_disk(str(tmp_path / "sae"), device="cpu", dtype="float32")
    some = x[:200].float()
    with torch.no_grad():
        assert torch.allclose(transcoder.encode(some), lens.encode(some), rtol=1e-4, atol=1e-4)
        ours = transcoder.decode(transcoder.encode(some), some)
        assert torch.allclose(ours, lens(some), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("skip", [False, True])
def test_means_and_scales_of_both_sides_go_into_the_weights(skip: bool) -> None:
    from sae.training.transcoder import Transcoder, TranscoderConfig

    config = TranscoderConfig(d_in=6, d_out=5, d_sae=12, k=3, skip=skip, apply_b_dec_to_input=False)
    made = Transcoder(config)
    chance = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=chance)
    made.topk_threshold.fill_(0.7)
    x = torch.randn(9, 6, generator=chance)
    x_mean, y_mean = torch.randn(6, generator=chance), torch.randn(5, generator=chance)

    def written(into: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = made.decode(made.encode(into))
        return y + into @ made.W_skip.T if skip else y

    with torch.no_grad():
        expected = written((x - x_mean) * 1.5) / 4.0 + y_mean
        made.fold_affine(x_mean, 1.5, y_mean, 4.0)
        assert torch.allclose(written(x), expected, rtol=1e-4, atol=1e-4)
    assert float(made.topk_threshold) == pytest.approx(0.7 / 4.0)


def test_an_sae_of_heads_is_exported_and_computes_here_what_sae_lens_does(
    work: Path, tmp_path: Path
) -> None:
    from sae_lens import SAE as LensSAE

    rows = activations.stored(work, "corpus", Z)
    recipe = Recipe(d_sae=256, k=16, tokens=128 * 100, batch=128, learning_rate=3e-3, dead_after=20)
    export(
        train(rows, recipe, heads=True),
        tmp_path / "sae",
        {"model_name": "tiny", "hook_name": str(Z)},
    )
    sae = opened(tmp_path / "sae")
    assert (sae.card.kind, sae.card.hook, sae.card.d_in) == ("sae", str(Z), 4 * 32)
    held_out = activations.stored(work, "held_out", Z)
    assert evaluate.reconstruction(sae, held_out).fvu < 0.6

    lens = LensSAE.load_from_disk(str(tmp_path / "sae"), device="cpu", dtype="float32")
    some = held_out[:100].float()
    by_head = some.view(1, 100, 4, 32)
    with torch.no_grad():
        assert torch.allclose(sae.encode(some), lens.encode(by_head)[0], rtol=1e-4, atol=1e-4)
        ours = sae.decode(sae.encode(some), some)
        assert torch.allclose(ours, lens(by_head)[0].flatten(1), rtol=1e-4, atol=1e-4)


# Figures


def write_transcoder(folder: Path, b_dec: torch.Tensor) -> Path:
    """One that writes nothing but its bias, whatever it reads."""
    folder.mkdir(parents=True)
    config = {
        "architecture": "transcoder",
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "d_sae": 2,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": str(READS), "hook_name_out": str(WRITES)},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(
        {
            "W_enc": torch.ones(D_MODEL, 2),
            "W_dec": torch.zeros(2, D_MODEL),
            "b_enc": torch.zeros(2),
            "b_dec": b_dec,
        },
        folder / "sae_weights.safetensors",
    )
    return folder


def test_a_transcoder_is_measured_where_it_writes(
    model: Any, tokenizer: Any, work: Path, tmp_path: Path
) -> None:
    x, y = activations.stored_pairs(work, "held_out", READS, WRITES)
    mean = y.float().mean(dim=0)
    cuts = activations.windows(tokenizer, corpus.read(work / "held_out.jsonl"))
    of_mean = opened(write_transcoder(tmp_path / "mean", mean))
    of_zero = opened(write_transcoder(tmp_path / "zero", torch.zeros(D_MODEL)))
    assert evaluate.reconstruction(of_mean, x, y).fvu == pytest.approx(1.0, abs=1e-4)
    found = evaluate.losses(model, tokenizer, cuts, of_mean, mean)
    assert found.reconstructed == pytest.approx(found.mean, abs=1e-5)
    assert found.mean != pytest.approx(found.clean, abs=1e-2)
    found = evaluate.losses(model, tokenizer, cuts, of_zero, mean)
    assert found.reconstructed == pytest.approx(found.zero, abs=1e-5)
    assert found.zero != pytest.approx(found.mean, abs=1e-3)


# All of it


def run(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_a_transcoder_with_skip_is_made_by_the_commands(
    model_folder: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("corpus", "held_out"):
        (folder / f"{name}.jsonl").write_bytes((work / f"{name}.jsonl").read_bytes())
    common = ("--model", model_folder, "--work", folder)
    places = ("--reads", READS, "--writes", WRITES)
    run(monkeypatch, activations, *common, "--hooks", READS, WRITES)
    run(
        monkeypatch, training, *common, *places, "--skip", "--output", tmp_path / "sae",
        "--tokens", 1024 * 3, "--d-sae", 96, "--k", 8,
    )  # fmt: skip
    run(monkeypatch, evaluate, *common, "--sae", tmp_path / "sae", "--statistics")
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == len(activations.stored(folder, "held_out", READS))
    assert (folder / f"contexts.{WRITES}.txt").exists()
    transcoder = opened(tmp_path / "sae")
    assert (transcoder.card.kind, transcoder.card.d_sae) == ("transcoder", 96)
    assert transcoder.card.has_max_activations


def test_an_sae_has_no_skip_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(
            monkeypatch, training, "--model", tmp_path, "--work", tmp_path, "--output", tmp_path,
            "--skip",
        )  # fmt: skip
    assert "an SAE has no skip connection" in capsys.readouterr().err
