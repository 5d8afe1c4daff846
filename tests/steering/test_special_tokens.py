"""Which tokens edits leave alone."""

from __future__ import annotations

from types import SimpleNamespace

from steering.request.special_tokens import special_token_ids


def test_special_tokens_are_all_that_are_flagged() -> None:
    tokenizer = SimpleNamespace(
        all_special_ids=[2, 0],
        added_tokens_decoder={
            7: SimpleNamespace(special=True),
            8: SimpleNamespace(special=False),
            2: SimpleNamespace(special=True),
        },
    )
    text_only = SimpleNamespace(vocab_size=100, eos_token_id=2)
    assert special_token_ids(tokenizer, text_only) == (0, 2, 7)
    assert special_token_ids(SimpleNamespace(all_special_ids=[1]), text_only) == (1,)


def test_tokens_that_stand_for_images_and_sounds_are_special_however_they_are_flagged() -> None:
    tokenizer = SimpleNamespace(
        all_special_ids=[2], added_tokens_decoder={9: SimpleNamespace(special=False)}
    )
    config = SimpleNamespace(
        image_token_index=9,
        audio_token_id=11,
        media_placeholder_token_id=12,
        video_token_id=None,
        mm_tokens_per_image=256,
        image_token_ids=[5],
    )
    assert special_token_ids(tokenizer, config) == (2, 9, 11, 12)
