"""KV connectors: which are refused, and whose blocks a decoding engine takes.

The configurations are vLLM's own, the schedulers too, and Nixl's side in them; no block is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.request.plan import PlannedEdit, PlannedRead, SteeringPlan
from steering.vllm import kv_transfer
from steering.vllm.kv_transfer import STAMP, connects_by_request, refuse_unsalted_connectors
from steering.vllm.support import UnsupportedEngineError

PROMPT_LEN = 300
BLOCK_SIZE = 128
SALT, OTHER_SALT = "a" * 64, "b" * 64


def multi(*children: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": list(children)},
    }


def connector_config(**settings: Any) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**{"kv_role": "kv_both", **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_connector": "LMCacheConnectorV1"}, "LMCacheConnectorV1, which .* by token ids"),
        ({"kv_connector": "HF3FSKVConnector"}, "HF3FSKVConnector, which .* by token ids"),
        ({"kv_connector": "ExampleConnector"}, "ExampleConnector, which .* by token ids"),
        ({"kv_connector": "DecodeBenchConnector"}, "made-up KV"),
        ({"kv_connector": "FlexKVConnectorV1"}, "may mix"),
        ({"kv_connector": "MoRIIOConnector"}, "may mix"),
        ({"kv_connector": "ConnectorOfTomorrow"}, "ConnectorOfTomorrow, which may mix"),
        (
            {"kv_connector": "OffloadingConnector", "kv_connector_module_path": "my.connectors"},
            "comes from my.connectors",
        ),
        (multi({"kv_connector": "NixlConnector"}, {"kv_connector": "ExampleConnector"}), "Example"),
        (multi(multi({"kv_connector": "LMCacheConnectorV1"})), "LMCacheConnectorV1"),
        (
            multi({"kv_connector": "NixlConnector", "kv_connector_module_path": "elsewhere"}),
            "comes from elsewhere",
        ),
    ],
)
def test_a_connector_that_may_mix_steered_blocks_with_others_is_refused_by_name(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedEngineError, match=words) as refusal:
        refuse_unsalted_connectors(connector_config(**settings))
    assert "\n" not in str(refusal.value)
    assert "OffloadingConnector" in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_connector": "OffloadingConnector"},
        {"kv_connector": "SimpleCPUOffloadConnector"},
        {"kv_connector": "MooncakeStoreConnector"},
        {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"},
        {"kv_connector": "MooncakeConnector"},
        multi({"kv_connector": "NixlPullConnector"}, {"kv_connector": "OffloadingConnector"}),
        {"kv_connector": None, "kv_role": None},
    ],
)
def test_a_connector_that_goes_by_salted_hashes_or_by_request_is_served(
    settings: dict[str, Any],
) -> None:
    refuse_unsalted_connectors(connector_config(**settings))


def test_an_engine_with_such_a_connector_does_not_start(make_engine: Callable[..., Any]) -> None:
    config = connector_config(kv_connector="ExampleConnector")
    with pytest.raises(UnsupportedEngineError, match=r"ExampleConnector, which .* by token ids"):
        make_engine(kv_transfer_config=config)


def test_an_engine_without_connector_is_served() -> None:
    refuse_unsalted_connectors(None)
    assert not connects_by_request(None)


def test_every_connector_of_vllm_is_judged() -> None:
    """A name of ours that vLLM does not know would be a slip of the pen."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    judged = {*kv_transfer.SALTED, *kv_transfer.BY_REQUEST, kv_transfer.MULTI}
    judged |= {kv_transfer.LMCACHE_MP, *kv_transfer._REASONS}
    assert judged <= KVConnectorFactory._registry.keys()


@pytest.mark.parametrize("simple", ["0", "1"])
def test_kv_offloading_is_a_connector_that_goes_by_hashes(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, simple: str
) -> None:
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", simple)
    config = engine_config(tiny_model("llama"), kv_offloading_size=1.0)
    assert config.kv_transfer_config.kv_connector in kv_transfer.SALTED
    refuse_unsalted_connectors(config.kv_transfer_config)


@pytest.mark.parametrize(
    ("files", "salts"),
    [
        ({"v1/multiprocess/custom_types.py": "cache_salt: str"}, True),
        ({"v1/multiprocess/custom_types.py": "token_ids: tuple"}, False),
        ({}, False),
        (
            {
                "v1/multiprocess/custom_types.py": "cache_salt: str",
                "integration/vllm/lmcache_mp_connector.py": "lookup(token_ids)",
            },
            False,
        ),
        (
            {
                "v1/multiprocess/custom_types.py": "cache_salt: str",
                "integration/vllm/lmcache_mp_connector.py": "import lmcache_mp_metadata",
                "integration/vllm/lmcache_mp_metadata.py": "request.cache_salt",
            },
            True,
        ),
    ],
)
def test_an_lmcache_package_from_before_salts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], salts: bool
) -> None:
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "lmcache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = connector_config(kv_connector="LMCacheMPConnector")
    if salts:
        refuse_unsalted_connectors(config)
        return
    with pytest.raises(UnsupportedEngineError, match="update lmcache"):
        refuse_unsalted_connectors(config)


def engine_config(model: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(model),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        **arguments,
    ).create_engine_config()


def scheduler(model: Path, role: str, connectors: Mapping[str, Any] | None = None) -> Any:
    """The scheduler of an engine of Nixl's, with nothing to run."""
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from steering.vllm.scheduler import SteeringScheduler

    settings = connectors or {"kv_connector": "NixlConnector"}
    config = engine_config(
        model, kv_transfer_config=connector_config(**{**settings, "kv_role": role})
    )
    config.cache_config.num_gpu_blocks = 64
    init_none_hash(digest)
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    return SteeringScheduler(
        config,
        kv_cache_config=KVCacheConfig(64, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
    )


EDIT = PlannedEdit(sae=0, latent=1, op=0, value=2.0, coverage=3, start=0, end=10_000)
READ = PlannedRead(0, 5, 3, 0, 10_000, None)


def plan(*, edits: tuple[PlannedEdit, ...] = (EDIT,), read: Any = None) -> SteeringPlan:
    return SteeringPlan("key", 1, PROMPT_LEN, edits, True, False, read)


def request(
    transfer: Mapping[str, Any], salt: str | None, steering: SteeringPlan | None, max_tokens: int
) -> Any:
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    extra: dict[str, Any] = {"kv_transfer_params": dict(transfer)}
    if steering is not None:
        extra["steering_plan"] = steering.to_wire()
    params = SamplingParams(max_tokens=max_tokens, extra_args=extra)
    return Request(
        *("request-0", list(range(4, 4 + PROMPT_LEN)), params, None),
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, digest),
    )


def digest(value: Any) -> bytes:
    return repr(value).encode()


def prefilled(prefill: Any, salt: str | None, steering: SteeringPlan | None) -> dict[str, Any]:
    """What the prefilling engine answers for the decoding one."""
    from vllm.v1.outputs import ModelRunnerOutput

    prefill.add_request(request({"do_remote_decode": True}, salt, steering, 1))
    scheduled = prefill.schedule()
    assert scheduled.num_scheduled_tokens == {"request-0": PROMPT_LEN}
    made = prefill.update_from_output(
        scheduled, ModelRunnerOutput(["request-0"], {"request-0": 0}, sampled_token_ids=[[7]])
    )
    (output,) = made[0].outputs
    answered: dict[str, Any] = output.kv_transfer_params
    assert answered["do_remote_prefill"]
    return answered


def computes_here(
    decode: Any, transfer: Mapping[str, Any], salt: str | None, steering: SteeringPlan | None
) -> bool:
    """Whether the decoding engine runs the prompt itself instead of fetching its blocks."""
    decode.add_request(request(transfer, salt, steering, 8))
    scheduled = decode.schedule()
    (awaits,) = scheduled.kv_connector_metadata.reqs_to_recv.values()
    tokens = scheduled.num_scheduled_tokens.get("request-0", 0)
    assert tokens in (0, PROMPT_LEN)
    # It is told of the request either way, so that it lets go of its blocks.
    assert bool(tokens) != any(map(len, awaits.local_block_ids))
    return bool(tokens)


@pytest.mark.parametrize(
    ("there", "here", "taken"),
    [
        ((None, None), (None, None), True),
        ((SALT, plan()), (SALT, plan()), True),
        ((SALT, plan()), (OTHER_SALT, plan()), False),
        ((None, None), (SALT, plan()), False),
        ((SALT, plan()), (None, None), False),
        (("tenant", None), ("tenant", None), True),
    ],
    ids=["clean", "alike", "otherwise", "clean there", "steered there", "a user's own salt"],
)
def test_a_decoding_engine_takes_only_blocks_that_were_steered_as_its_request_is(
    tiny_model: Callable[[str], Path], there: Any, here: Any, taken: bool
) -> None:
    model = tiny_model("llama")
    transfer = prefilled(scheduler(model, "kv_producer"), *there)
    assert transfer.get(STAMP) == (there[0] if there[1] is not None else None)
    assert computes_here(scheduler(model, "kv_consumer"), transfer, *here) != taken


def test_a_plain_engine_that_ignored_the_field_is_not_believed(
    tiny_model: Callable[[str], Path],
) -> None:
    model = tiny_model("llama")
    transfer = prefilled(scheduler(model, "kv_producer"), SALT, plan())
    del transfer[STAMP]
    assert computes_here(scheduler(model, "kv_consumer"), transfer, SALT, plan())


def test_a_request_that_only_reads_takes_nothing(tiny_model: Callable[[str], Path]) -> None:
    model = tiny_model("llama")
    reads = plan(edits=(), read=READ)
    transfer = prefilled(scheduler(model, "kv_producer"), None, reads)
    assert STAMP not in transfer
    decode = scheduler(model, "kv_consumer")
    reading = request(transfer, None, reads, 8)
    reading.skip_reading_prefix_cache = True  # as the door has it
    decode.add_request(reading)
    assert decode.schedule().num_scheduled_tokens == {"request-0": PROMPT_LEN}


def test_nixl_inside_of_another_connector_is_guarded_too(
    tiny_model: Callable[[str], Path],
) -> None:
    model = tiny_model("llama")
    transfer = prefilled(scheduler(model, "kv_producer"), SALT, plan())
    inside = multi({"kv_connector": "NixlConnector", "kv_role": "kv_consumer"})
    decode = scheduler(model, "kv_consumer", inside)
    decode.add_request(request(transfer, OTHER_SALT, plan(), 8))
    assert decode.schedule().num_scheduled_tokens == {"request-0": PROMPT_LEN}
