"""Full passes and CUDA graphs: which graphs they may take, and that a cut model computes the same.

No graph is captured here. The dispatch is vLLM's own, over the descriptors that its manager makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae.card import HookPoint
from steering.vllm import hook_points, runner_v2
from steering.vllm.piecewise import STEER, runs_between_pieces, split_at_steer
from steering.worker.ops import registered


def compilation_config(graphs: str = "FULL_AND_PIECEWISE", **settings: Any) -> Any:
    """As vLLM makes it for CUDA."""
    from vllm.config import CompilationConfig
    from vllm.config.compilation import CompilationMode, CUDAGraphMode

    config = CompilationConfig(
        **{
            "mode": CompilationMode.VLLM_COMPILE,
            "cudagraph_mode": CUDAGraphMode[graphs],
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
            "max_cudagraph_capture_size": 16,
            **settings,
        }
    )
    config.set_splitting_ops_for_v1(all2all_backend="allgather_reducescatter")
    return config


def test_the_op_is_one_that_vllm_cuts_at_where_it_captures_pieces() -> None:
    for mode in ("FULL_AND_PIECEWISE", "PIECEWISE"):
        config = compilation_config(mode)
        attention = list(config.splitting_ops)
        for _ in range(2):  # a worker may load its model again
            split_at_steer(config)
            assert config.splitting_ops == [*attention, STEER]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": 0},
        {"graphs": "NONE"},
        {"graphs": "FULL"},
        {"use_inductor_graph_partition": True},
        {"splitting_ops": []},
    ],
)
def test_a_model_that_is_not_captured_in_pieces_is_not_cut(settings: dict[str, Any]) -> None:
    config = compilation_config(**settings)
    before = list(config.splitting_ops)
    split_at_steer(config)
    assert config.splitting_ops == before


def test_breakable_graphs_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    config = compilation_config()
    split_at_steer(config)
    assert STEER not in config.splitting_ops


def manager(mode: str) -> Any:
    """vLLM's manager of graphs, as far as it decides which one a batch takes."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    config = compilation_config(mode)
    split_at_steer(config)
    made = object.__new__(CudaGraphManager)
    made.vllm_config = SimpleNamespace(
        speculative_config=None, cache_config=SimpleNamespace(use_kda_recoverssm=False)
    )
    made.compilation_config = config
    made.cudagraph_mode = config.cudagraph_mode
    made.max_num_reqs, made.decode_query_len, made.varlen_decode = 8, 1, False
    made.ubatch_runner, made.lora_capture_cases = None, [0]
    made._lora_dispatch_map, made._max_lora_case = {}, 0
    made._graphs_captured = True
    made._candidates, made._capture_descs = {}, {}
    made._init_candidates()
    return made


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """What the runner calls for a decode of four requests; `full` says whether one must encode."""
    from vllm.v1.worker.gpu import dp_utils

    wrapped = runner_v2._without_full_graphs(dp_utils.dispatch_cg_and_sync_dp)

    def decode(of: Any, full: bool, ranks: int = 1, rank: int = 0, **more: Any) -> Any:
        monkeypatch.setattr(runner_v2._full_pass, "needed", lambda: full)
        found, _ = wrapped(
            *(of, 4, 4, 1, ranks, rank),
            **{"max_query_len": 1, "need_eager": False, "uniform_decode": True, **more},
        )
        return found

    yield decode


@pytest.mark.parametrize(
    ("mode", "plain", "full"),
    [
        ("FULL_AND_PIECEWISE", "FULL", "PIECEWISE"),
        ("PIECEWISE", "PIECEWISE", "PIECEWISE"),
        ("FULL", "FULL", "NONE"),
        ("FULL_DECODE_ONLY", "FULL", "NONE"),
    ],
)
def test_a_full_pass_takes_pieces_where_there_are_any_and_never_a_full_graph(
    dispatch: Callable[..., Any], mode: str, plain: str, full: str
) -> None:
    graphs = manager(mode)
    assert dispatch(graphs, full=False).cg_mode.name == plain
    assert dispatch(graphs, full=True).cg_mode.name == full


def test_a_model_whose_graphs_hold_the_op_runs_full_passes_eagerly(
    dispatch: Callable[..., Any],
) -> None:
    graphs = manager("FULL_AND_PIECEWISE")
    graphs.compilation_config.splitting_ops.remove(STEER)
    assert not runs_between_pieces(graphs)
    assert dispatch(graphs, full=True).cg_mode.name == "NONE"


def test_a_pass_that_vllm_runs_eagerly_stays_eager(dispatch: Callable[..., Any]) -> None:
    for full in (False, True):
        assert dispatch(None, full=full, need_eager=True).cg_mode.name == "NONE"
        found = dispatch(manager("FULL_AND_PIECEWISE"), full=full, need_eager=True)
        assert found.cg_mode.name == "NONE"


@pytest.mark.parametrize(
    ("mode", "agreed"), [("FULL_AND_PIECEWISE", "PIECEWISE"), ("FULL", "NONE")]
)
def test_data_parallel_ranks_beside_a_full_pass_take_the_same_kind(
    dispatch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mode: str, agreed: str
) -> None:
    """The sum over ranks is made by hand: first what each would say, then all of it to each."""
    from vllm.v1.worker.gpu import dp_utils

    said: list[Tensor] = []
    monkeypatch.setattr(dp_utils, "get_dp_group", lambda: SimpleNamespace(cpu_group=None))
    monkeypatch.setattr(dp_utils, "should_skip_dp_coordination", lambda: False)
    monkeypatch.setattr(dp_utils.dist, "all_reduce", lambda t, group: said.append(t.clone()))
    needs = (True, False)
    graphs = [manager(mode) for _ in needs]
    for rank, full in enumerate(needs):
        dispatch(graphs[rank], full, len(needs), rank)
    total = torch.stack(said).sum(dim=0)
    monkeypatch.setattr(dp_utils.dist, "all_reduce", lambda t, group: t.copy_(total))
    found = [dispatch(graphs[r], full, len(needs), r) for r, full in enumerate(needs)]
    assert {desc.cg_mode.name for desc in found} == {agreed}
    assert len({desc.num_tokens for desc in found}) == 1


WIDTH = 16


class Attention(nn.Module):
    """Mixes nothing, but has a name that decoder layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.o_proj(hidden_states)
        return projected


class Layer(nn.Module):
    """A fused decoder layer, as most of vLLM's are."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else residual + hidden_states
        residual = residual + self.self_attn(nn.functional.rms_norm(residual, (WIDTH,)))
        return self.mlp(nn.functional.rms_norm(residual, (WIDTH,))), residual


class Model(nn.Module):
    """Three layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual: Tensor | None = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        assert residual is not None
        return nn.functional.rms_norm(hidden_states + residual, (WIDTH,))


class Doubling:
    """Adds the stream to itself, on the host, as no graph could."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def apply_at(self, hook: str, hidden_states: Tensor, residual: Tensor | None) -> None:
        self.hooks.append(hook)
        if float(hidden_states.abs().max()) > 0:
            hidden_states += hidden_states if residual is None else hidden_states + residual


@pytest.mark.parametrize("acts", [True, False], ids=["edited", "not edited"])
def test_a_model_that_vllm_cuts_at_the_op_computes_what_the_whole_one_does(acts: bool) -> None:
    from vllm.compilation.backends import split_graph

    torch.manual_seed(0)
    model = Model().eval()
    points = [HookPoint(0, "hook_resid_pre"), HookPoint(1, "hook_resid_post")]
    for point in points:
        hook_points.install(model, point, 3, tensor_parallel=1)
    applier = Doubling()
    before = list(registered._current)
    registered._current[:] = [applier] if acts else []
    try:
        x = torch.randn(5, WIDTH)
        with torch.inference_mode():
            expected = model(x.clone())
            pieces: list[Any] = []

            def cut(graph: Any, _: Any) -> Any:
                whole, items = split_graph(graph, [STEER])
                for item in items:
                    if not item.is_splitting_graph:
                        compiled = torch.compile(item.graph, backend="inductor", dynamic=False)
                        setattr(whole, item.submod_name, compiled)
                pieces.extend(items)
                return whole.forward

            applier.hooks.clear()
            made = torch.compile(model, backend=cut, fullgraph=True, dynamic=False)(x.clone())
    finally:
        registered._current[:] = before
    torch.testing.assert_close(made, expected)
    cuts = [item for item in pieces if item.is_splitting_graph]
    assert len(cuts) == 2
    for item in cuts:
        calls = [node for node in item.graph.graph.nodes if node.op == "call_function"]
        assert [str(node.target).startswith("vllm_sae") for node in calls].count(True) == 1
    assert applier.hooks == ([str(point) for point in points] if acts else [])
