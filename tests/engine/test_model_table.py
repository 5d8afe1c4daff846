"""What is served of every model of the installed vLLM is what the kept table says."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from tests.engine import model_table


@pytest.mark.timeout(300)
def test_every_layer_class_of_this_vllm_is_served_and_refused_as_the_table_says() -> None:
    made = model_table.lines(model_table.table()).splitlines()
    kept = model_table.TABLE.read_text(encoding="utf-8").splitlines()
    changed = [f"- {line}" for line in kept if line not in made]
    changed += [f"+ {line}" for line in made if line not in kept]
    assert not changed, "python -m tests.engine.model_table\n" + "\n".join(changed)


def test_the_layers_that_return_a_stale_residual_are_whole_and_gated_deltanet_is_served() -> None:
    rows = {
        title.split(" ")[0]: row["hook_resid_post"]
        for line in model_table.TABLE.read_text(encoding="utf-8").splitlines()
        if " | " in line
        for title, *cells in [line.split(" | ")]
        for row in [dict(cell.split(": ", 1) for cell in cells if ": " in cell)]
        if row
    }
    for name in (
        *("CohereDecoderLayer", "Cohere2MoeDecoderLayer", "CohereCompassDecoderLayer"),
        *("Exaone4DecoderLayer", "HyperCLOVAXDecoderLayer", "PhiMoEDecoderLayer"),
        *("GraniteMoeHybridAttentionDecoderLayer", "MuseGlimmerDecoderLayer"),
    ):
        assert rows[name] == "layer output", name
    for name in ("LlamaDecoderLayer", "Qwen3NextDecoderLayer", "Qwen3_5DecoderLayer"):
        assert rows[name] == "layer output + residual", name
    for name in ("InklingDecoderLayer", "Gemma3nDecoderLayer", "LoopCoderDecoderLayer"):
        assert rows[name].startswith("refused"), name


def test_the_readme_has_the_tables_summary() -> None:
    readme = Path(__file__).parents[2] / "server" / "README.md"
    assert model_table.SUMMARY.read_text(encoding="utf-8") in readme.read_text(encoding="utf-8")


def test_what_the_cpu_build_cannot_run_is_still_so() -> None:
    # Where this fails, a family more can be held against transformers: see CPU_LIMITS.
    from vllm import _custom_ops  # noqa: F401 (registers the kernels)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.model_executor.layers.rotary_embedding import get_rope

    assert not hasattr(torch.ops._C, "selective_scan_fwd")
    assert "CPU GDN attention requires BF16" in inspect.getsource(gdn_attention)
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(64, 512, True, {"rope_type": "default", "rope_theta": 10000.0})
        positions, heads = torch.arange(5), torch.randn(5, 4, 64)
        flat, _ = rope.forward_cpu(positions, heads.reshape(5, -1).clone(), None)
        apart, _ = rope.forward_cpu(positions, heads.clone(), None)
        right, _ = rope.forward_native(positions, heads.clone(), None)
    assert torch.allclose(flat.reshape(5, 4, 64), right, atol=1e-5)
    assert not torch.allclose(apart, right, atol=0.1)
