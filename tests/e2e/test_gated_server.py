"""A server in gated mode: its routes, and profile jobs that roll out on vLLM."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

pytest.importorskip("trl")

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.rollout import open_rollouts
from rlkv_vllm.tasks import get_task
from rlkv_vllm.training.config import make_config
from rlkv_vllm.training.gated_attention import attach_gates
from rlkv_vllm.training.job import run
from rlkv_vllm.training.loading import load_model
from tests.e2e.server import KEY, RLKV, Server, environment

#: A row of every layer differs from the others.
GATES = [[0.1 * layer, 1.0, 0.9, 0.0] for layer in range(5)]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("gated") / "log"
    with Server(["--mode", "gated", "--api-key", KEY], log) as running:
        yield running


@pytest.fixture
def http(gated: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=gated.url, headers=headers, timeout=120) as client:
        yield client


def job(output: Path, **rollout: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        "task": {"name": "hops"},
        "curriculum": {"problems": 8, "greedy": True},
        "evaluation": {"problems": 0},
        "rollout": rollout,
        "trainer": {
            "max_steps": 3,
            "learning_rate": 0.05,
            "reg": 0.02,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 150,
            "gradient_checkpointing": False,
        },
    }


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_routes_set_gates_and_roll_out_with_them(gated: Server, http: httpx.Client) -> None:
    assert httpx.get(f"{gated.url}/v1/rlkv/gates").status_code == 401
    assert http.get("/v1/rlkv/gates").json() == {
        "version": 0, "sink": 4, "window": 16, "gates": [[1.0] * 4] * 5,
    }  # fmt: skip
    for body, reason in [
        ({"gates": GATES[1:]}, "4 layers"),
        ({"gates": [[2.0, *row[1:]] for row in GATES]}, "from 0 to 1"),
    ]:
        answer = http.put("/v1/rlkv/gates", json=body)
        assert answer.status_code == 400
        assert reason in answer.text
    assert http.put("/v1/rlkv/gates", json={"gates": GATES}).json() == {"version": 1}
    shown = http.get("/v1/rlkv/gates").json()
    assert shown["version"] == 1
    assert shown["gates"] == torch.tensor(GATES).tolist()

    model, tokenizer, _ = load_model("embedded")
    prompts = [
        tokenizer.apply_chat_template(p.messages, add_generation_prompt=True)["input_ids"]
        for p in get_task("embedded").problems(4, 5)
    ] * 2
    sampling = {"max_tokens": 60, "temperature": 0.8, "seed": 3}
    body = {"prompts": prompts, "sampling": sampling}
    answers = http.post("/v1/rlkv/rollouts", json=body).json()["answers"]
    assert answers[:4] != answers[4:], "equal prompts of a group are answered differently"
    assert http.post("/v1/rlkv/rollouts", json=body).json()["answers"] == answers
    with attach_gates(model, 4, 16) as gates, torch.no_grad():
        gates.set_soft(GATES)
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = answer["token_ids"]
            assert answer["gates_version"] == 1
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
            expected = (logits / 0.8).log_softmax(-1)[torch.arange(len(tokens)), tokens]
            assert answer["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    for bad in (
        {"prompts": [[1] * 100_000], "sampling": {"max_tokens": 1}},
        {"prompts": [[10**6]], "sampling": {"max_tokens": 1}},
        {"prompts": [], "sampling": {"max_tokens": 1}},
    ):
        assert 400 <= http.post("/v1/rlkv/rollouts", json=bad).status_code < 500
    assert http.post("/v1/rlkv/rollouts", json=body).json()["answers"] == answers


def test_a_job_rolls_out_on_the_server(
    gated: Server, http: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = http.get("/v1/rlkv/gates").json()["version"]
    config = make_config(job(tmp_path / "run", engine="vllm-server", servers=[gated.url]), "test")
    with pytest.raises(RlkvError, match="answered 401"), open_rollouts(config):
        pass
    monkeypatch.setenv("RLKV_ROLLOUT_API_KEY", KEY)
    other = config.model_copy(update={"window": 8})
    with pytest.raises(RlkvError, match="--sink 4 --window 8"), open_rollouts(other):
        pass
    with open_rollouts(config) as rollouts:
        run(config, rollouts=rollouts)
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3
    assert all(row["logprob_difference"] < 1e-4 for row in rows)
    assert rows[-1]["gate_mean"] < 1
    assert http.get("/v1/rlkv/gates").json()["version"] == before + 3


def test_an_engine_of_another_model_stops_the_job(
    gated: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKV_ROLLOUT_API_KEY", KEY)
    config = make_config(job(tmp_path / "run", engine="vllm-server", servers=[gated.url]), "test")
    with open_rollouts(config) as rollouts:
        assert rollouts is not None
        # As if the server had not taken the gates.
        monkeypatch.setattr(rollouts, "set_gates", lambda gates: rollouts.version())
        rollouts.__class__.set_gates(rollouts, [[0.0] * 4] * 5)
        with pytest.raises(RlkvError, match="log-probabilities of engine and trainer differ"):
            run(config, rollouts=rollouts)


def test_a_job_with_an_engine_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    options = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    file.write_text(yaml.safe_dump(job(tmp_path / "run", engine="vllm-colocate", options=options)))
    done = subprocess.run(
        [*RLKV, "train", str(file), "--threads", "1"],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3
    assert all(row["logprob_difference"] < 1e-4 for row in rows)
    assert rows[-1]["gate_mean"] < 1


def test_a_split_server_has_no_gates(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server.url}/v1/rlkv/gates", headers=headers).status_code == 404
