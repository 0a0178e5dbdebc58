"""A server in gated mode: its routes, and profile jobs that roll out on vLLM."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import yaml
from schemathesis.generation import GenerationMode
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

pytest.importorskip("trl")

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.rollouts import open_rollouts
from rlkv_vllm.rollouts.protocol import Rollouts
from rlkv_vllm.tasks import get_task
from rlkv_vllm.tasks.puzzles import example_question
from rlkv_vllm.training.config import TrainConfig, make_config
from rlkv_vllm.training.job import run
from tests.e2e.test_schema import operations_of, statuses
from tests.support.page import Page
from tests.support.server import (
    ANSWER_TIMEOUT_S,
    KEY,
    RLKV,
    START_TIMEOUT_S,
    Server,
    environment,
    outliving,
)

#: A row of every layer differs from the others.
GATES = [[0.1 * layer, 1.0, 0.9, 0.0] for layer in range(5)]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("gated") / "log"
    with Server(["--mode", "gated", "--api-key", KEY], log) as running:
        yield running


@pytest.fixture
def http(gated: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}", "Connection": "close"}
    with httpx.Client(base_url=gated.url, headers=headers, timeout=2 * ANSWER_TIMEOUT_S) as client:
        yield client


def opened(config: TrainConfig) -> AbstractContextManager[Rollouts | None]:
    return open_rollouts(config.rollout, config.model, config.revision, config.dtype, config.span)


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
            "save_steps": 1,
        },
    }


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_routes_set_gates_and_roll_out_with_them(gated: Server, http: httpx.Client) -> None:
    assert httpx.get(f"{gated.url}/v1/rlkv/gates", timeout=ANSWER_TIMEOUT_S).status_code == 401
    shown = http.get("/v1/rlkv/gates").json()
    assert shown.pop("example") == example_question()
    assert shown == {
        "models": ["embedded"], "version": 0, "sink": 4, "window": 16, "gates": [[1.0] * 4] * 5,
    }  # fmt: skip
    for body, reason in [
        ({"gates": GATES[1:]}, "4 layers"),
        ({"gates": [[2.0, *row[1:]] for row in GATES]}, "from 0 to 1"),
        ({"gates": [["0.5", *row[1:]] for row in GATES]}, "valid number"),
        ({"gates": [[True, *row[1:]] for row in GATES]}, "valid number"),
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

    def roll_out(body: Any) -> Any:
        return http.post("/v1/rlkv/rollouts", json=body).json()["answers"]

    def tokens_of(answers: Any) -> list[list[int]]:
        return [answer["token_ids"] for answer in answers]

    answers = roll_out(body)
    tokens = tokens_of(answers)
    assert tokens[:4] != tokens[4:], "equal prompts of a group are answered differently"
    # With hits in the prefix cache now, so that log-probabilities are not equal to the bit.
    assert tokens_of(roll_out(body)) == tokens
    with attach_gates(model, 4, 16) as gates, torch.no_grad():
        gates.set_soft(GATES)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = answer["token_ids"]
            assert answer["gates_version"] == 1
            logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :]
            expected = (logits / 0.8).log_softmax(-1)[torch.arange(len(ids)), ids]
            assert answer["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    # Gates may come with the prompts: set if they are others, one set at a time.
    ones = [[1.0] * 4] * 5
    assert tokens_of(roll_out(body | {"gates": GATES})) == tokens
    with ThreadPoolExecutor(4) as pool:
        sent = [body | {"gates": values} for values in (GATES, ones) * 2]
        found = pool.map(roll_out, sent)
        versions = [{answer["gates_version"] for answer in one} for one in found]
    assert all(len(found) == 1 for found in versions)
    assert not (versions[0] | versions[2]) & (versions[1] | versions[3])
    assert http.put("/v1/rlkv/gates", json={"gates": GATES}).status_code == 200
    for bad in (
        body | {"gates": GATES[1:]},
        {"prompts": [[1] * 100_000], "sampling": {"max_tokens": 1}},
        {"prompts": [[10**6]], "sampling": {"max_tokens": 1}},
        {"prompts": [], "sampling": {"max_tokens": 1}},
    ):
        assert 400 <= http.post("/v1/rlkv/rollouts", json=bad).status_code < 500
    assert tokens_of(roll_out(body)) == tokens


def test_the_page_shows_the_gates_and_sets_them(
    gated: Server, http: httpx.Client, browser: WebDriver
) -> None:
    def gates() -> Any:
        return http.get("/v1/rlkv/gates").json()["gates"]

    def cell(layer: int, head: int) -> WebElement:
        return browser.find_elements(By.CSS_SELECTOR, "#map .cell.gate")[4 * layer + head]

    def set_to(gate: str) -> None:
        page.get("gate").clear()
        page.get("gate").send_keys(gate, Keys.ENTER)

    def shows(layer: int, head: int, gate: str) -> bool:
        label = f"Layer {layer}, KV head {head}: gate {gate}"
        with suppress(StaleElementReferenceException):  # drawn again just now
            return cell(layer, head).get_attribute("aria-label") == label
        return False

    http.put("/v1/rlkv/gates", json={"gates": GATES})
    page = Page(browser, gated.url)
    page.unlock()
    page.wait_for("state", lambda: page.get("state").text == "gated mode")
    assert page.get("model").text == "embedded"
    assert not page.get("key-card").is_displayed()
    assert not page.get("use-title").is_displayed()
    assert shows(4, 0, "0.400")
    cell(1, 3).click()
    set_to("0.25")
    page.wait_for("one gate", lambda: shows(1, 3, "0.250"))
    expected = torch.tensor(GATES)
    expected[1, 3] = 0.25
    assert gates() == expected.tolist()
    Select(page.get("gate-heads")).select_by_value("layer")
    set_to("0.5")
    page.wait_for("a layer", lambda: shows(1, 0, "0.500"))
    expected[1] = 0.5
    assert gates() == expected.tolist()
    http.put("/v1/rlkv/gates", json={"gates": GATES})
    page.wait_for("gates that another client set", lambda: shows(1, 0, "0.100"))
    page.get("question").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait_for("answer", lambda: "tokens in" in page.get("answer-note").text)
    assert page.errors() == []


@pytest.mark.parametrize(
    ("method", "route", "mode", "expected"),
    [
        ("GET", "/v1/rlkv/gates", GenerationMode.POSITIVE, {200}),
        ("PUT", "/v1/rlkv/gates", GenerationMode.POSITIVE, {400}),  # never the model's shape
        ("PUT", "/v1/rlkv/gates", GenerationMode.NEGATIVE, {400}),
        ("POST", "/v1/rlkv/rollouts", GenerationMode.POSITIVE, {400}),  # 200 for known tokens
        ("POST", "/v1/rlkv/rollouts", GenerationMode.NEGATIVE, {400}),
    ],
)
def test_answers_are_as_described(
    gated: Server, method: str, route: str, mode: GenerationMode, expected: set[int]
) -> None:
    assert expected <= statuses(operations_of(gated)[method, route], mode, 25) <= {200, 400}


@pytest.fixture(scope="module")
def on_server(gated: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that rolls out on the server."""
    output = tmp_path_factory.mktemp("jobs") / "run"
    config = make_config(job(output, engine="vllm-server", servers=[gated.url]), "test")
    with pytest.raises(RlkvError, match="answered 401"), opened(config):
        pass
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RLKV_ROLLOUT_API_KEY", KEY)
        other = config.model_copy(update={"window": 8})
        with pytest.raises(RlkvError, match="--sink 4 --window 8"), opened(other):
            pass
        with opened(config) as rollouts:
            run(config, rollouts=rollouts)
    return output


def check_job(output: Path) -> None:
    rows = metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["logprob_difference"] < 1e-4 for row in rows)
    assert rows[-1]["gate_mean"] < 1


def test_a_job_rolls_out_on_the_server(on_server: Path, http: httpx.Client) -> None:
    check_job(on_server)
    used = json.loads((on_server / "gates.jsonl").read_text().splitlines()[1])["gates"]
    assert http.get("/v1/rlkv/gates").json()["gates"] == used


def test_an_engine_of_another_model_stops_the_job(
    gated: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLKV_ROLLOUT_API_KEY", KEY)
    config = make_config(job(tmp_path / "run", engine="vllm-server", servers=[gated.url]), "test")
    with opened(config) as rollouts:
        assert rollouts is not None
        plain, closed = rollouts.generate, [[0.0] * 4] * 5
        monkeypatch.setattr(rollouts, "generate", lambda *asked: plain(*asked[:2], closed))
        with pytest.raises(RlkvError, match="log-probabilities of engine and trainer differ"):
            run(config, rollouts=rollouts)


def test_a_killed_job_with_an_engine_beside_it_resumes(on_server: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "run", tmp_path / "job.yaml"
    options = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    file.write_text(yaml.safe_dump(job(output, engine="vllm-colocate", options=options)))
    command = [*RLKV, "train", str(file), "--threads", "1"]
    with (tmp_path / "log").open("w") as log:
        killed = psutil.Popen(command, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (output / "checkpoint-1" / "complete.json").exists():
            assert killed.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        killed.suspend()  # or it may end its last steps meanwhile
        engine = killed.children(recursive=True)
        killed.kill()
        killed.wait()
    assert not outliving(engine), "the engine ends with its job"
    assert len(metrics(output)) < 3
    done = subprocess.run(
        [*command, "--resume"],
        env=environment(), text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_job(output)
    # Answers are the server's too, token for token: it has the same seeds.
    for ours, theirs in zip(metrics(output), metrics(on_server), strict=True):
        assert (ours["reward"], ours["output_tokens"]) == (
            theirs["reward"],
            theirs["output_tokens"],
        )
        assert ours["gate_mean"] == pytest.approx(theirs["gate_mean"], abs=1e-4)


def test_a_split_server_has_no_gates(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.get(f"{server.url}/v1/rlkv/gates", headers=headers, timeout=ANSWER_TIMEOUT_S)
    assert answer.status_code == 404
