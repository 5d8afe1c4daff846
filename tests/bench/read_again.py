"""Whether an ablated feature still fires when the edited stream is read again: delta and reread.

``python -m tests.bench.read_again [out.json]``

The demo model's own unsteered answers to the held-out prompts of ``steering_prompts.py``, which
``steering_effect`` kept. At every ordinary token, each feature that fires is switched off by
itself, as ``ablate`` does it with ``match`` ``delta`` and with ``reread``; then the SAE encodes the
edited stream. The arithmetic is that of ``sae.solve``, whose place in the engine other tests prove.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import fmean, quantiles
from typing import Any, Final

import torch
from torch import Tensor

from sae.features import FeatureTable
from sae.sae import SAE, open_sae
from sae.solve import LEAST_GAIN
from sae.source import SAEReference
from server.commands.demo_model import ensure_demo_model
from tests.bench.cases import D_SAE, SAE_NAME
from tests.bench.demo_engine import SAE as FOLDER
from tests.bench.demo_engine import SPECIAL_TOKENS
from tests.bench.record import RESULTS, Record, arguments
from tests.bench.steering_prompts import BEHAVIOURS

#: Shares of a feature's recorded maximum at which it stood: where an edit matters, and everywhere.
BANDS: Final[Mapping[str, tuple[float, float]]] = {
    "any": (0.0, float("inf")),
    "0.4 to 0.6 of the maximum": (0.4, 0.6),
    "above 0.75 of it": (0.75, float("inf")),
}
#: What the reread edit aims at, as a share of the threshold.
SILENT: Final = 0.9


def streams(sae: SAE) -> Tensor:
    """The stream at the SAE's layer on ordinary tokens: ``[n, d_in]`` float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ensure_demo_model()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    kept = json.loads((RESULTS / "steering_effect.json").read_text(encoding="utf-8"))["rows"]
    answers = {
        row["behaviour"]: row["answers"] for row in kept if row.get("ranked_by") == "unsteered"
    }
    found = []
    for behaviour in BEHAVIOURS:
        for prompt, answer in zip(behaviour.held_out, answers[behaviour.name], strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
            with torch.inference_mode():
                hidden = model(ids, output_hidden_states=True).hidden_states
            x = hidden[sae.card.layer + 1][0]
            ordinary = ids[0] >= SPECIAL_TOKENS
            if sae.card.sink_norm is not None:
                ordinary &= x.norm(dim=1) <= sae.card.sink_norm
            found.append(x[ordinary])
    return torch.cat(found)


def switched_off(sae: SAE, x: Tensor) -> dict[str, Tensor]:
    """Every firing of every feature, switched off by itself.

    Args:
        x: ``[n, d_in]``.

    Returns:
        columns ``[firings]``: ``feature``, ``before``, ``delta`` and ``reread`` (the activation
        read again), ``norm_delta`` and ``norm_reread`` (of the edit), ``solved`` (whether reread
        takes the feature).
    """
    rows = sae.rows(range(D_SAE))
    f = sae.encode(x)
    token, feature = f.nonzero(as_tuple=True)
    gain = (rows.W_enc * rows.gain[:, None] * rows.W_dec * rows.decoder_scale[:, None]).sum(dim=1)
    before = f[token, feature]
    W_dec = rows.W_dec * rows.decoder_scale[:, None]
    wanted = SILENT * rows.threshold[feature]
    amounts = {"delta": -before, "reread": (wanted - before) / gain[feature]}
    columns = {"feature": feature, "before": before, "solved": gain[feature] >= LEAST_GAIN}
    for name, amount in amounts.items():
        read = before + amount * gain[feature]  # the pre-activation, which is affine in the stream
        columns[name] = torch.where(read > rows.threshold[feature], read, 0.0)
        columns[f"norm_{name}"] = amount.abs() * W_dec[feature].norm(dim=1)
    return columns


def checked(sae: SAE, x: Tensor, columns: Mapping[str, Tensor]) -> None:
    """A hundred of the firings, by encoding the edited stream: the arithmetic above is right."""
    f = sae.encode(x)
    token, feature = f.nonzero(as_tuple=True)
    rows = sae.rows(range(D_SAE))
    some = torch.linspace(0, len(token) - 1, 100).long()
    at, latents = token[some], feature[some]
    amounts = -f[at, latents] * rows.decoder_scale[latents]
    again = sae.encode(x[at] + amounts[:, None] * rows.W_dec[latents])
    read = again[torch.arange(len(some)), latents]
    torch.testing.assert_close(read, columns["delta"][some], atol=5e-3, rtol=1e-3)


def main() -> None:
    """Measure every band and write the JSON."""
    args = arguments(__doc__).parse_args()
    sae = open_sae(SAEReference(SAE_NAME, str(FOLDER)))
    table = FeatureTable.open(FOLDER, D_SAE)
    x = streams(sae)
    columns = switched_off(sae, x)
    checked(sae, x, columns)
    maxima = torch.tensor([table.max_activation(i) or float("nan") for i in range(D_SAE)])
    share = columns["before"] / maxima[columns["feature"]]
    record = Record(
        "read_again",
        "Share of ablated features that fire when the edited stream is read again.",
        {"tokens": len(x), "sae": FOLDER.name, "firings": len(share)},
    )
    for name, (low, high) in BANDS.items():
        here = (share >= low) & (share < high)
        for match in ("delta", "reread"):
            kept = here & (columns["solved"] | torch.tensor(match == "delta"))
            fires = columns[match][kept] > 0
            left = (columns[match] / columns["before"])[kept][fires]
            ratio = (columns[f"norm_{match}"] / columns["norm_delta"])[kept].tolist()
            cuts = quantiles(ratio, n=20)
            record.add(
                stood=name,
                match=match,
                firings=int(kept.sum()),
                still_firing=fmean(fires.tolist()),
                at_of_before=fmean(left.tolist()) if len(left) else 0.0,
                norm_ratio=fmean(ratio),
                norm_5_to_95=f"{cuts[0]:.2f} to {cuts[-1]:.2f}",
            )
    record.save(args.json)


if __name__ == "__main__":
    main()
