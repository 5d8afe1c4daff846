"""A tiny Gemma 3 that takes images, whose vision tower is as deep as its language model."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.models import (
    BOS_ID,
    CHAT_TEMPLATE,
    D_MODEL,
    EOS_ID,
    MAX_LENGTH,
    NUM_LAYERS,
    PAD_ID,
    VOCAB_SIZE,
    make_tokenizer,
    randomize,
)

IMAGE_SIZE: Final = 56  # pixels
PATCH_SIZE: Final = 14
TOKENS_AN_IMAGE: Final = 4
#: Ids behind those of `make_tokenizer`, in this order.
START_OF_IMAGE_ID, END_OF_IMAGE_ID, IMAGE_ID = range(VOCAB_SIZE, VOCAB_SIZE + 3)
_NAMES: Final = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
#: Runs of newlines, which vLLM wants to find as tokens, as Gemma has them.
_NEWLINES: Final = tuple("\n" * count for count in range(1, 5))
_TOWER: Final = "vision_tower.vision_model."
_PARTS: Final = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)


def make_vision_model(folder: Path) -> Path:
    """Write a random float32 checkpoint with its tokenizer and image processor."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    width = {"hidden_size": D_MODEL, "intermediate_size": 2 * D_MODEL}
    config = Gemma3Config(
        text_config={
            **width,
            **special,
            "vocab_size": VOCAB_SIZE + len(_NAMES) + len(_NEWLINES),
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "max_position_embeddings": MAX_LENGTH,
        },
        vision_config={
            **width,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "vision_use_head": False,
        },
        mm_tokens_per_image=TOKENS_AN_IMAGE,
        boi_token_index=START_OF_IMAGE_ID,
        eoi_token_index=END_OF_IMAGE_ID,
        image_token_index=IMAGE_ID,
        tie_word_embeddings=True,
        dtype="float32",
        **special,
    )
    model = Gemma3ForConditionalGeneration(config)
    randomize(model, 0)
    model.save_pretrained(folder)
    _rename(folder / "model.safetensors")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
        extra_special_tokens=_NAMES,
    )
    tokenizer.add_tokens([*_NEWLINES])
    assert tokenizer.convert_tokens_to_ids(_NAMES["image_token"]) == IMAGE_ID
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer,
        chat_template=CHAT_TEMPLATE.replace("{{ message['content'] }}", _PARTS),
        image_seq_length=TOKENS_AN_IMAGE,
    ).save_pretrained(folder)
    return folder


def _rename(file: Path) -> None:
    """Give the tower's tensors the names of published checkpoints, which vLLM looks for."""
    tensors = load_file(file)
    renamed = {name.replace("vision_tower.", _TOWER): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})


def noise(seed: int) -> Any:
    """An image of random pixels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (40, 70, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def data_url(image: Any) -> str:
    """An image as clients send it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
