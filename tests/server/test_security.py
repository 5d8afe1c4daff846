"""What the threat model (deploy/SECURITY.md) says of keys, files, hostile texts and logs."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from vllm.entrypoints.serve.middleware import authenticate
from vllm.entrypoints.serve.utils.api_utils import log_non_default_args

from sae.self_check import Measured, Outcome, stated_by
from sae.source import ResolvedSAE
from server.__main__ import main
from server.commands.inspect_sae import outcome_table
from server.routes.generate import ROUTES
from steering.request.limits import MAX_INTERVENTIONS, MAX_TOP_K
from tests.models import make_tiny_sae
from tests.server.conftest import Server, StartServer
from tests.server.fakes import serve_args

#: Clears the screen, sets the window's title, rings, closes a tag of rich's, and turns the text.
ESCAPES = "\x1b[2J\x1b]0;owned\x07[/bold][red]\u202e"
MARKUP = "<script>alert(1)</script>"
FEATURES = [{"index": 0, "label": f"{MARKUP}{ESCAPES}\n\0", "examples": [{"text": ESCAPES}]}]
EDIT = {"feature": 5, "op": "clamp", "value": 1}


def harmless(printed: str) -> bool:
    """Whether a terminal would obey nothing but newlines of what was printed."""
    return all(character.isprintable() or character == "\n" for character in printed)


def complete(server: Server, steering: Any, **more: Any) -> Any:
    return server.client.post("/v1/completions", json={"prompt": "x", "steering": steering, **more})


# Keys


def test_keys_are_compared_as_digests_in_constant_time_every_one_of_them(
    start: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = authenticate.secrets.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return bool(compare(one, other))

    monkeypatch.setattr(authenticate, "secrets", SimpleNamespace(compare_digest=spy))
    server = start("--api-key", "sesame", "second")
    for key, status in (("sesame", 200), ("second", 200), ("s", 401)):
        compared.clear()
        headers = {"authorization": f"Bearer {key}"}
        assert server.client.get("/v1/saes", headers=headers).status_code == status
        # A match with the first key does not spare the second one.
        assert [(len(one), len(other)) for one, other in compared] == [(32, 32), (32, 32)]


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/saes", "/v1//saes", "/./v1/saes", "/V1/saes", "/%761/saes", "/v1%2fsaes"),
        *("/metrics/../v1/saes", "/metrics/..%2fv1/saes", "/v1/saes;x", "/v1/saes/", "/v1/saes?x"),
        *("/v1/saes%00", "/v1/saes%23", "/%2e/v1/saes", "/\u200bv1/saes"),
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(start: StartServer, path: str) -> None:
    server = start("--api-key", "sesame")
    for method in ("GET", "POST"):
        answer = server.client.request(method, path, follow_redirects=True)
        # Below /metrics, which asks for no key, every path is /metrics.
        assert answer.status_code in (401, 404, 405) or "# HELP" in answer.text
        assert "hook_resid_post" not in answer.text


def test_key_is_in_no_log(start: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    started = logging.getLogger("vllm.entrypoints.serve.utils.api_utils")
    started.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="vllm"):
            log_non_default_args(serve_args("--api-key", "sesame"))
            server = start("--api-key", "sesame")
            for key in ("sesame", "sesame2"):
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "x", "steering": {"what": 1}}
                server.client.post("/v1/completions", json=body, headers=headers)
    finally:
        started.removeHandler(caplog.handler)
    assert "api_key" in caplog.text and "refused" in caplog.text
    assert "sesame" not in caplog.text


# Files, addresses and pickles in a request

_heard: list[tuple[str, str]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is not None and event in (
        *("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo"),
        *("pickle.find_class", "subprocess.Popen", "exec", "import"),
    ):
        _heard.append((event, str(arguments)))


@contextmanager
def audited() -> Iterator[list[tuple[str, str]]]:
    """What Python reports of files, connections, pickles and processes meanwhile."""
    global _heard
    if not hasattr(sys, "_vllm_sae_audit"):
        sys.addaudithook(_listen)  # for good: Python has no way to take one off
        sys._vllm_sae_audit = True  # type: ignore[attr-defined]
    heard: list[tuple[str, str]] = []
    _heard = heard
    try:
        yield heard
    finally:
        _heard = None


@pytest.mark.parametrize("path", ROUTES)
def test_request_opens_no_file_and_no_connection_that_it_names(
    server: Server, tmp_path: Path, path: str
) -> None:
    real = make_tiny_sae(tmp_path / "another")
    names = [
        *(str(real), f"{real}/", f"file://{real}", f"../{real.name}", f"x={real}"),
        *("http://sae.example/x", "hf://owner/repo", "sae_lens://release/id", "a,hook=x", "a\0"),
    ]
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    said = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"}}.get(path, said)
    body = {**said, "model": "tiny", "max_tokens": 2}
    with audited() as heard:
        for name in names:
            for steering in (
                {"interventions": [{**EDIT, "sae": name}]},
                {"read": {"sae": name}},
            ):
                answer = server.client.post(path, json={**body, "steering": steering})
                assert answer.json()["error"]["code"] == "unknown_sae"
    assert [event for event in heard if event[0] not in ("exec", "import")] == []


class Exploit:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_in_a_steered_request_is_never_read(server: Server, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    exploit = b64encode(pickle.dumps(Exploit(ran))).decode()
    steering = {"interventions": [EDIT]}
    with audited() as heard:
        for more in ({"prompt_embeds": exploit}, {"vllm_xargs": {"steering_plan": exploit}}):
            answer = complete(server, steering, **more)
            assert answer.json()["error"]["code"] == "unsupported_combination"
        assert complete(server, exploit).json()["error"]["code"] == "invalid_type"
    assert not ran.exists()
    assert "pickle.find_class" not in [event for event, _ in heard]


# Limits


def test_megabytes_of_edits_are_refused_by_their_number_before_they_are_looked_at(
    server: Server,
) -> None:
    error = complete(server, {"interventions": [{}] * 1_000_000}).json()["error"]
    assert error["code"] == "too_many_interventions"
    assert len(error["message"]) < 200
    error = complete(server, {"x" * 1_000_000: 1}).json()["error"]
    assert error["code"] == "unknown_field"
    assert len(error["message"]) + len(error["param"]) < 300


def test_most_that_one_request_may_ask_for(server: Server) -> None:
    most = [{**EDIT, "feature": i} for i in range(MAX_INTERVENTIONS)]
    steering = {"interventions": most, "read": {"top_k": MAX_TOP_K}}
    assert complete(server, steering).status_code == 200
    assert complete(server, {"interventions": [*most, EDIT]}).status_code == 400
    assert complete(server, {"read": {"top_k": MAX_TOP_K + 1}}).status_code == 400


# Texts that strangers wrote


def test_labels_cannot_break_out_of_an_answer(start: StartServer) -> None:
    server = start(saes={"a": {"features": FEATURES}})
    for path in ("/v1/saes/a/features?limit=1", "/v1/saes/a/features/0"):
        answer = server.client.get(path)
        assert answer.headers["content-type"] == "application/json"
        # Not a byte that a terminal would obey: JSON spells them out.
        assert not any(byte < 0x20 or byte == 0x7F for byte in answer.content)
        (feature,) = answer.json().get("data", [answer.json()])
        assert feature["label"] == FEATURES[0]["label"]


def test_imported_labels_stay_on_their_line_and_off_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_sae(tmp_path / "sae")
    label = f'{MARKUP}{ESCAPES}"\n{{"index": 3, "label": "forged"}}\n'
    for name, row in (
        ("features", {"index": "1", "maxActApprox": 7.0}),
        ("explanations", {"index": "1", "description": label}),
    ):
        file = tmp_path / "export" / name / "batch-0.jsonl.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert main(["import-labels", str(folder), str(tmp_path / "export")]) == 0
    assert harmless(capsys.readouterr().out)
    written = (folder / "features.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["index"] for row in rows] == [1]
    assert "\x1b" not in written and "\0" not in written


@pytest.mark.parametrize(
    "key",
    [
        *("architecture", "dtype", "d_in", "normalize_activations", "activation_fn", "hook_name"),
        *("metadata", "model_name", ESCAPES),
    ],
)
def test_hostile_configuration_prints_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = make_tiny_sae(tmp_path / "sae")
    settings = json.loads((folder / "cfg.json").read_text())
    for changed in (settings, settings["metadata"]):
        if key in changed or changed is settings:
            changed[key] = ESCAPES
    (folder / "cfg.json").write_text(json.dumps(settings))
    main(["inspect-sae", str(folder)])
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)


def test_hostile_tensor_name_prints_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_sae(tmp_path / "sae")
    weights = folder / "sae_weights.safetensors"
    save_file({**load_file(weights), ESCAPES: torch.zeros(1)}, weights)
    assert main(["inspect-sae", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert r"\x1b[2J" in line
    assert harmless(line)


def test_hostile_model_name_of_a_configuration_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_tiny_sae(tmp_path / "sae", metadata={"model_name": ESCAPES})
    reference = ResolvedSAE("a", str(folder), path=str(folder))
    said = stated_by(reference, exactly_k=False)
    assert said.model is None
    outcome = Outcome(SimpleNamespace(id="a"), Measured(9, 0, 1.0, 0.5), said, "tiny")  # type: ignore[arg-type]
    Console().print(outcome_table(outcome))
    assert harmless(capsys.readouterr().out)


# Logs


@pytest.mark.parametrize("path", ["/v1/saes/%0D%0AINFO%20forged", "/v1/saes/%1b[2J", "/v1/saes/ "])
def test_path_cannot_forge_a_line_of_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with caplog.at_level("INFO", logger="vllm.sae.server"):
        assert server.client.get(path).status_code == 404
    for record in caplog.records:
        assert harmless(record.getMessage()) and "\n" not in record.getMessage()


def test_prompts_are_logged_only_when_asked_for() -> None:
    assert serve_args().enable_log_requests is False
    deploy = Path(__file__).parents[2] / "deploy"
    for file in [*deploy.rglob("*.yaml"), deploy.parent / "Dockerfile"]:
        assert "enable-log-requests" not in file.read_text(encoding="utf-8")


def test_images_send_no_usage_statistics() -> None:
    dockerfile = Path(__file__).parents[2] / "Dockerfile"
    final_stages = dockerfile.read_text(encoding="utf-8").split("\nFROM ")[1:]
    served = [stage for stage in final_stages if "ENTRYPOINT" in stage]
    assert len(served) == 2
    assert all("VLLM_NO_USAGE_STATS=1" in stage for stage in served)
