"""What is served of every model of the installed vLLM is what the kept table says."""

from __future__ import annotations

import pytest

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
