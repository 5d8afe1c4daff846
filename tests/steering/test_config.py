"""What the command line hands down arrives whole, and what cannot serve a request is refused."""

from __future__ import annotations

import json

import pytest

from sae.source import ResolvedSAE
from steering.config import SteeringConfig

CONFIG = SteeringConfig(
    saes=(ResolvedSAE("a", "folder", path="/folder"),),
    d_model=64,
    num_layers=4,
    special_token_ids=(0, 2),
    max_rows=100,
    max_read_values=200,
)


def test_configuration_comes_back_from_json_as_it_was() -> None:
    assert SteeringConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize("name", CONFIG.to_dict())
def test_configuration_that_lacks_something_is_an_error(name: str) -> None:
    lacking = {key: value for key, value in CONFIG.to_dict().items() if key != name}
    with pytest.raises(KeyError, match=name):
        SteeringConfig.from_dict(lacking)


@pytest.mark.parametrize(("name", "least"), [("max_rows", 64), ("max_read_values", 64)])
def test_limit_that_no_request_could_keep_is_refused(name: str, least: int) -> None:
    SteeringConfig.from_dict({**CONFIG.to_dict(), name: least})
    with pytest.raises(ValueError, match=f"{name} {least - 1} is less than the {least} features"):
        SteeringConfig.from_dict({**CONFIG.to_dict(), name: least - 1})
