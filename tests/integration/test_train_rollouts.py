"""Profile jobs whose answers come from elsewhere: order, age of the gates, failures, resuming."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.rollouts.protocol import Gates
from rlkv_vllm.training.config import TrainConfig
from rlkv_vllm.training.job import run
from rlkv_vllm.training.run import Listener
from tests.integration.test_train import config, rows

STEPS = 6


class Canned:
    """Always the same short answer; keeps what it is asked."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[tuple[Any, int]] = []
        self.gates: list[Gates] = []
        self._fails_at = fails_at

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, gates: Gates
    ) -> list[Answer]:
        if len(self.asked) == self._fails_at:
            raise RlkvError("the engine is gone")
        self.asked.append((prompts, sampling.seed))
        self.gates.append(gates)
        return [Answer([5, 6, *sampling.stop_token_ids[:1]], logprobs=[-1.0] * 3) for _ in prompts]


def job(output: Path, staleness: int) -> TrainConfig:
    # No answer is right, so only the decay of the optimiser moves the gates.
    asked = config(
        output, max_steps=STEPS, tau=0.0, weight_decay=0.5, max_logprob_difference=1000.0
    )
    rollout = asked.rollout.model_copy(update={"engine": "vllm-server", "staleness": staleness})
    evaluation = asked.evaluation.model_copy(update={"problems": 0})
    # Long enough for right answers.
    curriculum = asked.curriculum.model_copy(update={"max_new_tokens": 150})
    return asked.model_copy(
        update={"rollout": rollout, "evaluation": evaluation, "curriculum": curriculum}
    )


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Canned]:
    """A run without staleness."""
    output, engine = tmp_path_factory.mktemp("runs") / "waiting", Canned()
    run(job(output, 0), rollouts=engine)
    return output, engine


@pytest.fixture
def output(waiting: tuple[Path, Canned], tmp_path: Path) -> Path:
    """The folder of another run, which has its curriculum already."""
    for name in ("curriculum.jsonl", "curriculum.json"):
        shutil.copy(waiting[0] / name, tmp_path)
    return tmp_path


def lags_as_logged(output: Path, engine: Canned) -> list[int]:
    """How old the gates of every batch were; they are those of that step."""
    tables = [[[1.0] * 4] * 5, *(row["gates"] for row in rows(output, "gates.jsonl"))]
    lags = [int(row["gates_lag"]) for row in rows(output, "metrics.jsonl")]
    assert engine.gates == [tables[step - lag] for step, lag in enumerate(lags)]
    assert len({str(table) for table in tables}) == STEPS + 1
    return lags


def test_without_staleness_every_batch_has_the_gates_of_its_step(
    waiting: tuple[Path, Canned],
) -> None:
    assert lags_as_logged(*waiting) == [0] * STEPS


def test_answers_are_written_ahead_and_gates_are_never_too_old(
    waiting: tuple[Path, Canned], output: Path
) -> None:
    engine = Canned()
    run(job(output, 2), rollouts=engine)
    assert engine.asked == waiting[1].asked, "the same problems and seeds, none beyond the end"
    lags = lags_as_logged(output, engine)
    assert lags[0] == 0
    assert 0 < max(lags) <= 2


def test_a_killed_run_with_staleness_loses_and_repeats_no_problem(
    waiting: tuple[Path, Canned], output: Path
) -> None:
    def die(row: dict[str, Any], total: int) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job(output, 2), rollouts=Canned(), listener=Listener(on_step=die))
    engine = Canned()
    run(job(output, 2), rollouts=engine, resume=True)
    assert engine.asked == waiting[1].asked[2:]
    assert [row["step"] for row in rows(output, "metrics.jsonl")] == [*range(1, STEPS + 1)]


def test_a_failing_engine_stops_the_job_when_its_answers_are_needed(output: Path) -> None:
    with pytest.raises(RlkvError, match="the engine is gone"):
        run(job(output, 2), rollouts=Canned(fails_at=2))
    assert len(rows(output, "metrics.jsonl")) == 2


def test_an_engine_of_another_model_stops_the_job(output: Path) -> None:
    asked = job(output, 2)
    strict = asked.model_copy(update={"trainer": asked.trainer | {"max_logprob_difference": 0.1}})
    with pytest.raises(RlkvError, match="log-probabilities of engine and trainer differ"):
        run(strict, rollouts=Canned())
