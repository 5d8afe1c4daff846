"""The benchmarks' cheap parts, so that they cannot rot; nothing here depends on how fast it ran."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import torch

import steering
from tests.bench import roofline, step_gpu, table
from tests.bench.alternate import Compared, Run, alternate, paired, ratios
from tests.bench.cases import CONTROL, FULL, REQUESTS, TOPK, Case
from tests.bench.cases import steering as configurations_of
from tests.bench.direction import FRENCH_SHARE, french_share
from tests.bench.op_alone import Case as OpCase
from tests.bench.peer_saelens import by_row, one_configuration
from tests.bench.record import RESULTS, Plot, Record, Target, shown_value, spread
from tests.bench.startup import opened, sparse_sae


def test_a_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0])
    assert (found["low"], found["median"], found["high"]) == (1.75, 2.5, 3.25)
    assert spread([7.0])["low"] == spread([7.0])["high"] == 7.0


def test_a_target_is_held_against_the_median() -> None:
    figure = spread([0.97, 0.98, 0.5])
    assert Target("ratio", figure, 0.97).met
    assert not Target("ratio", figure, 0.98).met
    assert Target("share", figure, 0.97, at_most=True).met


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.98765, "0.988"), (12.345, "12.3"), (1234.5, "1,234"), (3, "3"), ("none", "none")],
)
def test_numbers_show_the_digits_that_mean_something(value: object, shown: str) -> None:
    assert shown_value(value) == shown


def test_a_ratio_is_taken_against_the_mean_of_both_neighbours() -> None:
    one = Compared(Run(4.0, ttft=3.0, itl=0.5), Run(1.0, 1.0, 0.5), Run(5.0, 2.0, 1.5))
    assert one.throughput_ratio == 0.75
    assert one.ttft_ratio == 2.0
    assert one.itl_ratio == 0.5


def test_latencies_that_were_not_measured_have_no_column() -> None:
    one = Compared(Run(1.0), Run(1.0), Run(1.0))
    assert list(ratios([one])) == ["throughput_ratio"]


def test_every_case_stands_between_two_runs_of_the_reference() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> Run:
        order.append(name)
        return Run(seconds)

    found = alternate(
        lambda: run("reference", 1.0),
        {"slow": lambda: run("slow", 2.0), "same": lambda: run("same", 1.0)},
        rounds=5,
        warm=False,
    )
    round_of = ["reference", "case", "reference", "case", "reference"]
    assert ["reference" if name == "reference" else "case" for name in order] == round_of * 5
    assert sorted(name for name in order if name != "reference") == ["same"] * 5 + ["slow"] * 5
    assert [one.throughput_ratio for one in found["slow"]] == [0.5] * 5
    assert [one.throughput_ratio for one in found["same"]] == [1.0] * 5
    assert paired(found["slow"], found["same"])["median"] == 0.5


def test_configurations_share_no_feature() -> None:
    edits = [edit for field in configurations_of(32, 64) for edit in field["interventions"]]
    assert len({edit["feature"] for edit in edits}) == len(edits) == 32 * 64


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_case_steers_the_share_of_requests_that_it_names(case: Case) -> None:
    fields = case.fields()
    steered = [json.dumps(field) for field in fields if field is not None]
    assert len(fields) == REQUESTS
    assert len(steered) == {CONTROL: 0, TOPK: REQUESTS // 2}.get(case, REQUESTS)
    assert len(set(steered)) == case.configurations


@pytest.mark.parametrize(
    ("tokens", "configurations"), [(2, 2), (257, 2)], ids=("decode", "prefill")
)
def test_the_op_alone_edits_every_token_of_every_pass(tokens: int, configurations: int) -> None:
    case = OpCase(tokens, edits=1, configurations=configurations, d_in=16)
    assert case.seconds() > 0
    first = case.hidden.clone()
    case.seconds(evict=torch.zeros(8))
    assert torch.equal(case.hidden, first)
    assert not torch.equal(case.hidden, case.stream)
    assert case.touched.tolist() == [2 * tokens, 0]


def test_a_hook_for_rows_sets_what_hooks_for_one_configuration_set() -> None:
    edits = [[(0, 1.0), (3, 2.0)], [(1, -1.0), (2, 5.0)]]
    f = torch.arange(16.0).reshape(2, 2, 4)
    alone = [f[i : i + 1].clone() for i in range(2)]
    for one, row in zip(alone, edits, strict=True):
        one_configuration(row)(one)
    by_row(edits)(f)
    assert torch.equal(f, torch.cat(alone))
    assert f.tolist() == [
        [[1.0, 1.0, 2.0, 2.0], [1.0, 5.0, 6.0, 2.0]],
        [[8.0, -1.0, 5.0, 11.0], [12.0, -1.0, 5.0, 15.0]],
    ]


def test_sparse_saes_open_as_any_others_do(tmp_path: Path) -> None:
    paths = [sparse_sae(tmp_path / f"l{i}", i, d_in=16, d_sae=32) for i in range(2)]
    found = opened(paths, requested=4)
    assert set(found) == {"open_seconds", "open_megabytes", "rows_milliseconds", "check_seconds"}


def test_a_record_becomes_a_page_and_a_plot(tmp_path: Path) -> None:
    record = Record(
        "tiny",
        "One sentence.",
        {"rounds": 3, "flags": ["--a", "1"]},
        Plot(x="k", y="ratio", series="shape, edits", line=1.0),
    )
    for k in (1, 8):
        record.add(shape="decode", edits=8, k=k, ratio=spread([0.9, 1.0, 1.1]))
    record.add(shape="decode", edits=8, k="8 to 1", ratio=spread([1.0]), only_here="yes")
    record.target("ratio of tiny", spread([0.95]), 0.98)
    record.target("share of tiny", spread([0.2]), 0.5, at_most=True)
    folder = tmp_path / "results"
    record.save(folder / "tiny.json")
    (folder / table.NOTES).write_text("Written by hand.\n")
    table.write(folder)
    page = (folder / "README.md").read_text()
    assert "| ratio of tiny | ≥ 0.98 | 0.950 (0.950 to 0.950) | **missed** by 0.030 |" in page
    assert "| share of tiny | ≤ 0.5 | 0.200 (0.200 to 0.200) | met |" in page
    assert "| shape | edits | k | ratio | only here |" in page
    assert "| decode | 8 | 8 | 1.000 (0.950 to 1.050) |  |" in page
    assert "rounds 3, flags `--a 1`; load average" in page
    assert "Written by hand." in page
    assert "](plot.png)" in page
    assert (folder / table.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", [RESULTS, RESULTS / "epyc"], ids=lambda folder: folder.name)
def test_the_page_in_the_repository_is_that_of_the_results_beside_it(folder: Path) -> None:
    page, plot = table.page_of(folder), folder / table.PLOT
    assert plot.exists()
    made = table.page(
        table.read(folder),
        (folder / table.NOTES).read_text(),
        plot.relative_to(page.parent).as_posix(),
    )
    assert page.read_text() == made


def test_rows_of_an_experiment_are_in_its_file_each_time_it_is_saved(tmp_path: Path) -> None:
    record = Record("experiment", "Answers.", {})
    rows = record.kept.setdefault("rows", [])
    for i in range(2):
        rows.append({"answers": [f"answer {i}"]})
        record.add(case=i)
        record.save(tmp_path / "out.json")
        assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows


def test_what_was_measured_before_a_benchmark_failed_is_saved(tmp_path: Path) -> None:
    record = Record("broken", "A benchmark that fails.", {})
    with pytest.raises(RuntimeError, match="in the middle"), record.saved(tmp_path / "out.json"):
        record.add(case="first", seconds=1.0)
        raise RuntimeError("in the middle")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"] == [{"case": "first", "seconds": 1.0}]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", roofline.H100),
        ("NVIDIA H200", roofline.H200),
        ("NVIDIA A100-SXM4-80GB", roofline.A100),
        ("NVIDIA B200", roofline.B200),
        # Of other memory: 2.0, 4.0 and 1.6 TB/s.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", None),
    ],
)
def test_a_gpu_is_held_against_its_own_rates_or_none(
    name: str, device: roofline.Device | None
) -> None:
    assert roofline.device_named(name) is device


def test_a_decode_step_is_timed_once_no_prompt_is_left() -> None:
    # While the second prompt is computed, the first request waits 3 s between two tokens.
    assert step_gpu.decode_step([(0.0, 8.0), (5.0, 10.0)], tokens=6) == 1.0


def test_french_is_told_from_english_and_spanish() -> None:
    here = RESULTS.parent
    french, english = (
        [french_share(line) for line in (here / f"{name}.txt").read_text().splitlines()]
        for name in ("french", "english")
    )
    assert len(french) == len(english) == 16
    assert mean(french) > 2 * FRENCH_SHARE
    assert max(english) < FRENCH_SHARE
    assert french_share("La casa de mi hermana es un lugar que se encuentra en el centro") == 0
    assert french_share("") == 0
    assert french_share("Il dort.") == 0.5


@pytest.mark.parametrize(
    "rows",
    [
        roofline.bytes_table(),
        roofline.decode_table(roofline.H100, 1024),
        roofline.decode_table(roofline.H100, 0),
        roofline.gates_table(roofline.H100, 1024),
        roofline.halves_table(roofline.H100, 1024),
        roofline.heads_table(1024),
        roofline.whole_table(roofline.H100, 1024),
        roofline.prefill_table(roofline.H100, 2048),
        roofline.split_table(roofline.H100),
    ],
    ids=["bytes", "decode", "empty cache", "gates", "halves", "heads", "whole", "prefill", "split"],
)
def test_the_page_of_the_kernels_has_the_rooflines_tables(rows: list[str]) -> None:
    page = Path(steering.__file__).parent / "worker" / "ops" / "README.md"
    assert "\n".join(rows) in page.read_text()
