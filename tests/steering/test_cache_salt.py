"""Who shares prefix-cache blocks with whom."""

from __future__ import annotations

from steering.request.cache_salt import cache_salt, unsteered_salt
from steering.request.parse import parse_spec
from tests.steering.specs import ONE, edit

SUMS = {"a": "0" * 64}


def salt(
    raw: object, prompt_len: int = 10, user: str | None = None, sums: dict[str, str] = SUMS
) -> str | None:
    return cache_salt(parse_spec(raw, ONE), sums, prompt_len, user)


def test_a_salt_is_stable_and_what_vllm_accepts() -> None:
    made = salt(edit())
    assert made is not None
    assert len(made) == 64
    assert made == salt(edit())
    assert not set(made) & set("@/\\\0")


def test_reading_alone_shares_with_unsteered_requests() -> None:
    assert salt({"read": {}}) is None
    assert salt({"read": {}}, user="mine") == "mine"


def test_other_weights_or_another_users_salt_part_requests() -> None:
    assert salt(edit()) != salt(edit(), sums={"a": "1" * 64})
    assert salt(edit()) != salt(edit(), user="mine")
    assert salt(edit(), user="yours") != salt(edit(), user="mine")


def test_prompt_length_counts_only_where_phases_differ() -> None:
    alike, apart = edit(), edit(positions={"generation": False})
    assert salt(alike, prompt_len=10) == salt(alike, prompt_len=11)
    assert salt(apart, prompt_len=10) != salt(apart, prompt_len=11)


def test_a_users_salt_is_never_one_that_steering_makes() -> None:
    made = salt(edit())
    assert made is not None
    other = unsteered_salt(made)
    assert other not in (None, made)
    assert other == unsteered_salt(made)
    assert [unsteered_salt(user) for user in (None, "mine", made.upper())] == [
        None,
        "mine",
        made.upper(),
    ]
