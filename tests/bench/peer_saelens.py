"""The peer's side of ``peers.py``: transformers, and an SAE of SAELens in a forward hook.

Runs in an environment of its own, which has transformers and sae-lens and nothing of this project:
``python tests/bench/peer_saelens.py MODEL SAE``. Each line on standard input is a job, each line on
standard output its answer:

    {"prompts": [[id, ...], ...], "edits": [[[feature, value], ...], ...], "tokens": n, "rows": b}
    {"seconds": s, "tokens": [[id, ...], ...]}

``edits`` is one list of clamps for each prompt; all prompts are of one length.

The hook is the one of the tutorials: encode the layer's output, set the features, decode, put the
SAE's error back. It closes over one configuration, so the prompts of each distinct configuration
make a batch of their own and batches follow each other. With ``rows`` it is instead one batch, and
a hook that sets each row's own features: what somebody would write who needs it. Neither touches
tokens of a norm that marks an attention sink.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

Edits = list[tuple[int, float]]
SetFeatures = Callable[[Tensor], None]


class Peer:
    """The model with its SAE."""

    def __init__(self, model: str, sae: str) -> None:
        from sae_lens import SAE
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.sae = SAE.load_from_disk(sae, device="cpu", dtype="float32")
        metadata = self.sae.cfg.metadata
        self.layer = int(metadata.hook_name.split(".")[1])
        self.sink_norm = float(metadata.sink_norm)

    def generate(self, prompts: list[list[int]], edit: SetFeatures | None, n: int) -> list[Any]:
        """Greedily ``n`` tokens for each prompt, in one batch, under one hook."""
        handle = None
        if edit is not None:
            handle = self.model.model.layers[self.layer].register_forward_hook(self.hook(edit))
        ids = torch.tensor(prompts)
        try:
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        finally:
            if handle is not None:
                handle.remove()
        new: list[Any] = out[:, ids.shape[1] :].tolist()
        return new

    def hook(self, edit: SetFeatures) -> Callable[..., Any]:
        """A forward hook that edits the layer's output ``[batch, tokens, d_in]``."""

        def run(module: Any, inputs: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            f = self.sae.encode(x)
            error = x - self.sae.decode(f)
            edit(f)
            edited = self.sae.decode(f) + error
            edited = torch.where(x.norm(dim=-1, keepdim=True) > self.sink_norm, x, edited)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return run


def one_configuration(edits: Edits) -> SetFeatures:
    """Clamps for every row alike."""
    features = torch.tensor([feature for feature, _ in edits])
    values = torch.tensor([value for _, value in edits])

    def edit(f: Tensor) -> None:
        f[..., features] = values

    return edit


def by_row(edits: list[Edits]) -> SetFeatures:
    """Clamps for each row, the same number in all."""
    features = torch.tensor([[feature for feature, _ in row] for row in edits])
    values = torch.tensor([[value for _, value in row] for row in edits])

    def edit(f: Tensor) -> None:
        index = features[:, None].expand(-1, f.shape[1], -1)
        f.scatter_(2, index, values[:, None].expand_as(index))

    return edit


@torch.inference_mode()
def answer(peer: Peer, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job."""
    prompts, n = job["prompts"], job["tokens"]
    edits: list[Edits] = [[(int(f), float(v)) for f, v in row] for row in job["edits"]]
    started = perf_counter()
    if not any(edits):
        tokens = peer.generate(prompts, None, n)
    elif job["rows"]:
        tokens = peer.generate(prompts, by_row(edits), n)
    else:
        tokens = [None] * len(prompts)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(edits):
            groups.setdefault(tuple(row), []).append(i)
        for group in groups.values():
            made = peer.generate([prompts[i] for i in group], one_configuration(edits[group[0]]), n)
            for i, one in zip(group, made, strict=True):
                tokens[i] = one
    return {"seconds": perf_counter() - started, "tokens": tokens}


def serve(make: Callable[[], Any], do: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Answer jobs line by line; what libraries print goes to standard error."""
    replies, sys.stdout = sys.stdout, sys.stderr
    peer = make()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(do(peer, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1], sys.argv[2]), answer)
