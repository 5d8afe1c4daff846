"""The served model's unembedding, read from its checkpoint's files.

The engine's own copy lives in other processes, which are busy. So the files are memory-mapped here
and read a part at a time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.card import HookPoint
from steering.branch_outputs import FLOATS, BranchOutputs

logger = logging.getLogger("vllm.sae.steering")

#: Rows of the unembedding upcast at a time: [ROWS_AT_A_TIME, d_model] float32.
ROWS_AT_A_TIME: Final = 8192

_HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING: Final = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_FINAL_NORM: Final = re.compile(
    r"(^|\.)(norm|ln_f|final_layer_norm|final_layernorm|ln_final)\.weight$"
)
_NOT_THE_DECODER: Final = re.compile(
    r"\.\d+\.|(^|\.)(vision|visual|audio|encoder|mtp)[^.]*\.", re.IGNORECASE
)
#: Types of models whose RMS norm multiplies by 1 + weight (vLLM's GemmaRMSNorm).
_NORM_WEIGHT_PLUS_ONE: Final = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
    }
)
#: Types of models whose final norm is a layer norm without a bias: no tensor tells it from an RMS
#: norm.
_LAYER_NORM_WITHOUT_BIAS: Final = frozenset({"cohere", "cohere2"})


class Unembedding:
    """W_U ``[vocab, d_model]`` and the weight gamma ``[d_model]`` of the norm before it.

    A direction d added to the last residual stream moves the logits by W_U (gamma * d), up to the
    norm's common factor 1/|x|, which changes no order; a layer norm first takes away d's mean.

    Args:
        files: the file that each tensor of the checkpoint is in, by the tensor's name.
        head: name of W_U.
        norm: name of the norm's weight.
        plus_one: whether gamma is 1 + that weight; else it is that weight.
        centred: whether the norm takes away the mean.
        token_text: the text of a token id.
        num_tokens: tokens of the tokenizer.
        vocab_size: logits of the model.
    """

    def __init__(
        self,
        files: dict[str, Path],
        head: str,
        norm: str,
        *,
        plus_one: bool,
        centred: bool,
        token_text: Callable[[int], str],
        num_tokens: int,
        vocab_size: int,
        branches: BranchOutputs,
    ) -> None:
        #: How many logits the model has: usually a few more than the tokenizer has tokens.
        self.vocab_size = vocab_size
        self._file = files[head]
        self._head = head
        self._centred = centred
        self._token_text = token_text
        self._num_tokens = num_tokens
        self._branches = branches
        with safe_open(files[norm], framework="pt") as file:
            self._gamma = file.get_tensor(norm).float() + float(plus_one)  # [d_model]

    def in_stream(self, rows: Tensor, hook: str) -> Tensor | None:
        """What the stream gains if decoder rows [n, d] are added at a hook point: [n, d_model].

        None if it is that of attention's heads and the checkpoint does not show their projection.
        """
        return self._branches.in_stream(rows, HookPoint.parse(hook))

    def strongest(self, direction: Tensor, count: int) -> tuple[list[list[Any]], list[list[Any]]]:
        """The tokens that a direction promotes and suppresses most.

        The score of a token is (W_U (gamma * d/|d|))_token. A zero direction promotes and
        suppresses nothing.

        Args:
            direction: ``[d_model]`` float32.
            count: how many tokens of each kind.

        Returns:
            The promoted and the suppressed tokens, ``[text, score]`` each, the strongest first.
        """
        if not direction.any():
            return [], []
        logits = self.logits(torch.nn.functional.normalize(direction, dim=0))
        up, down = logits.topk(count), (-logits).topk(count)
        return (
            [[self._token_text(int(i)), float(v)] for v, i in zip(*up, strict=True)],
            [[self._token_text(int(i)), -float(v)] for v, i in zip(*down, strict=True)],
        )

    def logits(self, direction: Tensor) -> Tensor:
        """W_U (gamma * d) of the tokenizer's tokens.

        Args:
            direction: ``[d_model]`` float32.

        Returns:
            ``[num_tokens]`` float32.
        """
        scaled = self._scaled(direction)
        return torch.cat([rows @ scaled for _, rows in self._rows(self._num_tokens)])

    def promoted(self, directions: Tensor, count: int) -> Tensor:
        """Ids of the tokens whose logits each direction raises most, over the whole vocabulary.

        Args:
            directions: ``[n, d_model]`` float32.
            count: how many tokens for each direction.

        Returns:
            ``[n, min(count, vocab_size)]`` int64, best first.
        """
        scaled = self._scaled(directions)
        best = scaled.new_empty(len(scaled), 0)
        ids = torch.empty(len(scaled), 0, dtype=torch.int64)
        for start, rows in self._rows(self.vocab_size):
            logits = torch.cat([best, scaled @ rows.T], dim=1)
            ids_of_rows = torch.arange(start, start + len(rows)).expand(len(scaled), -1)
            best, at = logits.topk(min(count, logits.shape[1]), dim=1)
            ids = torch.cat([ids, ids_of_rows], dim=1).gather(1, at)
        return ids

    def _scaled(self, direction: Tensor) -> Tensor:
        if self._centred:
            direction = direction - direction.mean(dim=-1, keepdim=True)
        scaled: Tensor = self._gamma * direction
        return scaled

    def _rows(self, most: int) -> Iterator[tuple[int, Tensor]]:
        """The first ``most`` rows of W_U, a part at a time: its first index, [rows, d_model]."""
        with safe_open(self._file, framework="pt") as file:
            rows = file.get_slice(self._head)
            count = min(rows.get_shape()[0], most)
            for start in range(0, count, ROWS_AT_A_TIME):
                yield start, rows[start : min(start + ROWS_AT_A_TIME, count)].float()


def open_unembedding(model_config: Any, tokenizer: Any) -> Unembedding | None:
    """The unembedding of a vLLM model; None if its checkpoint does not show one.

    A checkpoint does not if its format is not safetensors, if its head is quantized, or if it is
    not clear which tensors are the head and the norm before it.

    Args:
        model_config: vLLM's `ModelConfig`.
        tokenizer: the model's; without one there is no unembedding.
    """
    folder = _folder(model_config.model, model_config.revision)
    if folder is None or tokenizer is None:
        return None
    try:
        files = _tensors(folder)
        return _find(files, model_config.hf_text_config, tokenizer)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("no promoted tokens: %s: %s", folder, error)
        return None


def _find(files: dict[str, Path], config: Any, tokenizer: Any) -> Unembedding | None:
    d_model: int = config.hidden_size
    decoder = [name for name in files if not _NOT_THE_DECODER.search(name)]
    head = _only(decoder, _HEAD) or _only(decoder, _EMBEDDING)
    norm = _only(decoder, _FINAL_NORM)
    if head is None or norm is None:
        return None
    if not (_is_float(files, head, [d_model]) and _is_float(files, norm, [])):
        return None
    biased = norm.removesuffix("weight") + "bias" in files
    plus_one = config.model_type in _NORM_WEIGHT_PLUS_ONE
    return Unembedding(
        files,
        head,
        norm,
        plus_one=plus_one,
        centred=biased or config.model_type in _LAYER_NORM_WITHOUT_BIAS,
        token_text=lambda token: str(tokenizer.decode([token])),
        num_tokens=len(tokenizer),
        vocab_size=config.vocab_size,
        branches=BranchOutputs(files, config.model_type, plus_one=plus_one),
    )


def _only(names: Iterable[str], pattern: re.Pattern[str]) -> str | None:
    found = [name for name in names if pattern.search(name)]
    return found[0] if len(found) == 1 else None


def _is_float(files: dict[str, Path], name: str, row: list[int]) -> bool:
    with safe_open(files[name], framework="pt") as file:
        stored = file.get_slice(name)
        return stored.get_dtype() in FLOATS and stored.get_shape()[1:] == row


def _folder(model: str, revision: str | None) -> Path | None:
    """Where the checkpoint lies on disk; the engine has fetched it by now."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _tensors(folder: Path) -> dict[str, Path]:
    """Every tensor's name and the file it is in."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found
