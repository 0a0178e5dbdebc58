"""Scorers, masked decoding and `rlkv score`, on a random model of the testbed's shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pydantic import StrictBool
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.streaming import name_of
from rlkv_vllm.answers import Sampling
from rlkv_vllm.cli.score import score
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation import by_mask
from rlkv_vllm.evaluation.by_mask import fresh_problems
from rlkv_vllm.hf import own_answers
from rlkv_vllm.hf.answer_loss import Sample, SplitLoss, answer_loss, make_batch
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.options import Positive, Section, override
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.scorers import METHODS, get_scorer, head_importance, run
from rlkv_vllm.scorers.head_importance import path_gradients
from rlkv_vllm.scorers.scorer import Scorer, ScoringInput, Weight, to_gates
from rlkv_vllm.tasks import Problem, get_task
from tests.support import oracle
from tests.support.checkpoints import NUM_KV_HEADS, NUM_LAYERS, make_checkpoint
from tests.support.profiles import assert_one_line

SINK, WINDOW = 2, 5
FULL_HEADS = [[0, 3], [], [0, 1, 2, 3], [2]]

pytestmark = pytest.mark.usefixtures("one_thread")


class WordTask:
    """Prompts of very different lengths; right is whatever `accept` says."""

    name = "words"

    def __init__(self, accept: Sequence[bool] = (True,)) -> None:
        self.accept = accept

    def problems(self, n: int, seed: int) -> list[Problem]:
        problems = []
        for i in range(n):
            words = [f"+{(seed + i + k) % 10}" for k in range(5 + 7 * i % 23)]
            answer = "yes" if self.accept[i % len(self.accept)] else "no"
            problems.append(Problem([{"role": "user", "content": " ".join(words)}], answer))
        return problems

    def score(self, text: str, problem: Problem) -> float:
        return float(problem.answer == "yes")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from rlkv_vllm.testbed.tokenizer import build_tokenizer

    return build_tokenizer(512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any, tokenizer: Any) -> Path:
    path = make_checkpoint("qwen3", tmp_path_factory.mktemp("model"))
    # No id that the tokenizer does not know can come out of the model.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


#: Settings that make a run short.
QUICK: dict[str, dict[str, Any]] = {
    "self-distill": {"steps": 3, "batch_size": 2},
    "duo-attention": {"steps": 3, "batch_size": 2, "texts": 4, "length": 60, "passkeys": 2},
    "causal-head-gating": {"steps": 2, "batch_size": 2},
}
#: Those that need no more than the model: `rlkv` needs the training packages and minutes.
QUICK_METHODS = sorted(set(METHODS) - {"rlkv"})


def scoring_input(
    model: Any,
    scorer: Scorer,
    report: Any = lambda *_: None,
    *,
    seed: int = 0,
    **settings: Any,
) -> ScoringInput:
    g = torch.Generator().manual_seed(3)
    samples = []
    for length in (30, 44):
        ids = torch.randint(8, 200, (length,), generator=g).tolist()
        samples.append(Sample(ids[:12], ids[12:]))
    task = WordTask()
    return ScoringInput(
        model=model,
        tokenizer=None,
        task=task,
        problems=task.problems(2, 0),
        samples=samples,
        sink=SINK,
        window=WINDOW,
        seed=seed,
        settings=scorer.settings(QUICK.get(scorer.name, {}) | settings),
        report=report,
    )


# --- scorers ---------------------------------------------------------------------------


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", QUICK_METHODS)
def test_every_scorer_gives_gates(name: str, model: Any) -> None:
    reports: list[tuple[int, int]] = []
    before = weights_of(model)
    scorer = get_scorer(name)
    gates = scorer.score(
        scoring_input(model, scorer, lambda done, total, *_: reports.append((done, total)))
    )
    assert [len(row) for row in gates] == [NUM_KV_HEADS] * NUM_LAYERS
    assert all(0 <= gate <= 1 for row in gates for gate in row)
    assert len({gate for row in gates for gate in row}) > 1
    assert gates == scorer.score(scoring_input(model, scorer))
    assert reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert scorer.name == name
    json.dumps(scorer.settings().model_dump(), allow_nan=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_gates_of_a_bfloat16_model_are_trained_in_float32(model: Any) -> None:
    scorer = get_scorer("self-distill")
    gates = scorer.score(scoring_input(model.bfloat16(), scorer))
    # Steps of less than 1/256 do not exist near 1 in bfloat16.
    assert any(gate != torch.tensor(gate).bfloat16().item() for row in gates for gate in row)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


def test_random_gates_depend_on_the_seed_alone(model: Any) -> None:
    scorer = get_scorer("random")
    gates = [scorer.score(scoring_input(model, scorer, seed=seed)) for seed in (0, 0, 1)]
    assert gates[0] == gates[1] != gates[2]


def test_unknown_scorers_are_refused() -> None:
    with pytest.raises(RlkvError) as error:
        get_scorer("guess")
    assert_one_line(error.value, "--method guess", "head-importance")


def test_every_method_has_a_scorer_of_its_name() -> None:
    assert {name: get_scorer(name).name for name in METHODS} == {name: name for name in METHODS}


class Options(Section):
    steps: Positive = 4
    lr: Weight = 0.5
    on: StrictBool = False


def test_settings_are_checked_against_their_schema() -> None:
    scorer = Scorer("x", "a paper", lambda given: [], Options)
    assert scorer.settings().model_dump() == {"steps": 4, "lr": 0.5, "on": False}
    found = scorer.settings(override({}, ["steps=7", "lr=1", "on=True"])).model_dump()
    assert found == {"steps": 7, "lr": 1.0, "on": True}
    assert [type(value) for value in found.values()] == [int, float, bool]
    assert scorer.settings({"lr": 0.25, "on": True}) == Options(steps=4, lr=0.25, on=True)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("step=7", ["--set step", "x has no such setting", "steps (4), lr (0.5), on (False)"]),
        ("steps=7.5", ["--set: steps: ", "integer", "7.5"]),
        ("steps=0", ["--set: steps: ", "greater than or equal to 1"]),
        ("lr=fast", ["--set: lr: ", "number", "fast"]),
        ("lr=.nan", ["--set: lr: "]),
        ("lr=nan", ["--set: lr: "]),
        ("lr=-1", ["--set: lr: "]),
        ("on=1", ["--set: on: ", "valid boolean"]),
    ],
)
def test_bad_settings(given: str, parts: list[str]) -> None:
    scorer = Scorer("x", "a paper", lambda given: [], Options)
    with pytest.raises(RlkvError) as error:
        scorer.settings(override({}, [given]))
    assert_one_line(error.value, *parts)
    with pytest.raises(RlkvError) as error:
        get_scorer("random").settings({"steps": 3})
    assert_one_line(error.value, "random has no such setting", "none at all")


@torch.no_grad()
def loss(given: ScoringInput, full_heads: list[list[int]]) -> float:
    with attach_gates(given.model, SINK, WINDOW) as gates:
        gates.set_hard(full_heads)
        batches = [make_batch([sample], given.model.device) for sample in given.samples]
        losses = [answer_loss(given.model, batch).item() for batch in batches]
    return sum(losses) / len(losses)


def test_path_gradients_sum_to_what_full_attention_saves(model: Any) -> None:
    given = scoring_input(model, get_scorer("head-importance"))
    everything = [list(range(NUM_KV_HEADS))] * NUM_LAYERS
    saved = loss(given, everything) - loss(given, [[]] * NUM_LAYERS)
    gradients = path_gradients(given, 32)
    assert gradients.shape == (32, NUM_LAYERS, NUM_KV_HEADS)
    assert abs(saved) > 0.01
    assert gradients.mean(0).sum().item() == pytest.approx(saved, rel=0.02)


def test_every_point_of_the_path_counts_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = torch.tensor([[[-3.0, 1.0, 0.0]], [[0.0, -400.0, 0.0]]])
    monkeypatch.setattr(head_importance, "path_gradients", lambda given, steps: points)
    # Shares .75, -.25, 0, then 0, 1, 0: the means are .375, .375 and 0.
    given = scoring_input(model, get_scorer("head-importance"))
    assert head_importance.score_heads(given) == [[1.0, 1.0, 0.0]]


def test_to_gates_keeps_the_order() -> None:
    scores = [[-0.2, 3.0], [0.5, 0.0], [1e-9, -1e-9]]
    gates = to_gates(scores)
    assert min(map(min, gates)) == 0
    assert max(map(max, gates)) == 1
    for sparsity in (0.0, 1 / 6, 0.5, 5 / 6, 1.0):
        assert allocate(gates, sparsity) == allocate(scores, sparsity)
    assert to_gates([[0.3, 0.3]]) == [[1.0, 1.0]]


# --- masked decoding -------------------------------------------------------------------


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_masked_decoding_equals_the_oracle(
    checkpoint: Path, model: Any, tokenizer: Any, batch_size: int
) -> None:
    task = WordTask()
    reports: list[tuple[int, int]] = []
    result = solve(
        model,
        tokenizer,
        task,
        task.problems(5, 0),
        split=HeadSplit(FULL_HEADS, SINK, WINDOW),
        sampling=greedy(12),
        batch_size=batch_size,
        report=lambda done, total, *_: reports.append((done, total)),
    )
    assert reports[-1] == (5, 5)
    for problem, answer in zip(task.problems(5, 0), result.answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            problem.messages, add_generation_prompt=True, return_dict=False
        )
        assert answer.prompt_ids == prompt
        ids = [*prompt, *answer.token_ids[:-1]]
        expected = oracle.logprobs(checkpoint, ids, FULL_HEADS, SINK, WINDOW)
        assert expected[len(prompt) - 1 :].argmax(-1).tolist() == answer.token_ids
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_split_for_every_problem_equals_one_split_at_a_time(
    model: Any, tokenizer: Any, batch_size: int
) -> None:
    task = WordTask()
    problems = task.problems(5, 0)
    none, everything = [[] for _ in FULL_HEADS], [list(range(4)) for _ in FULL_HEADS]
    splits = [HeadSplit(full, SINK, WINDOW) for full in (FULL_HEADS, none, everything) * 2][:5]
    # Some rows end early, so that the others go on in a smaller batch.
    free = solve(model, tokenizer, task, problems, split=splits, sampling=greedy(12))
    model.generation_config.eos_token_id = [free.answers[1].token_ids[3]]
    settings: dict[str, Any] = {"sampling": greedy(12), "batch_size": batch_size}
    together = solve(model, tokenizer, task, problems, split=splits, **settings)
    assert len({len(answer.token_ids) for answer in together.answers}) > 1
    for i, split in enumerate(splits):
        alone = solve(model, tokenizer, task, problems, split=split, **settings)
        assert together.answers[i] == alone.answers[i]


def test_decoding_stops_at_the_end_token_or_the_cap(model: Any, tokenizer: Any) -> None:
    task = WordTask()
    problems = task.problems(4, 0)
    free = solve(model, tokenizer, task, problems, sampling=greedy(11))
    assert [len(a.token_ids) for a in free.answers] == [11] * 4
    assert free.capped_share == 1
    end = free.answers[2].token_ids[4]
    model.generation_config.eos_token_id = [end]
    stopped = solve(model, tokenizer, task, problems, sampling=greedy(11))
    for before, after in zip(free.answers, stopped.answers, strict=True):
        ids = before.token_ids
        expected = ids[: ids.index(end) + 1] if end in ids else ids
        assert after.token_ids == expected
        assert after.hit_cap == (end not in ids)
    assert len(stopped.answers[2].token_ids) <= 5
    lengths = [len(a.token_ids) for a in stopped.answers]
    assert stopped.mean_output_tokens == sum(lengths) / 4


def test_sampling_parameters_change_the_answers(model: Any, tokenizer: Any) -> None:
    task = WordTask()
    problems = task.problems(4, 0)

    def tokens(**sampling: Any) -> list[list[int]]:
        asked = Sampling(max_tokens=6, **sampling)
        result = solve(model, tokenizer, task, problems, sampling=asked)
        return [answer.token_ids for answer in result.answers]

    most_likely = tokens(temperature=0)
    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens(seed=1) != most_likely
    assert tokens(seed=1, top_k=1) == tokens(seed=1, min_p=1.0) == most_likely
    end = most_likely[0][2]
    stopped = tokens(temperature=0, stop_token_ids=(end,))
    assert stopped[0] == most_likely[0][: most_likely[0].index(end) + 1]
    assert tokens(temperature=0, repetition_penalty=0.01) != most_likely


def test_results_count_what_the_task_accepts(model: Any, tokenizer: Any) -> None:
    task = WordTask(accept=(True, False, False, True, True))
    result = solve(model, tokenizer, task, task.problems(5, 0), sampling=greedy(2))
    assert result.correct == [True, False, False, True, True]
    assert result.accuracy == 0.6


# --- rlkv score ------------------------------------------------------------------------


def score_app() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("score")(score)
    return app


def invoke(*args: str) -> Any:
    return CliRunner().invoke(score_app(), list(args))


def test_score_writes_a_profile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = WordTask(accept=(True, False))
    monkeypatch.setattr(run, "get_task", lambda name: task)
    files = []
    for name in ("a.json", "b.json"):
        output = tmp_path / name
        result = invoke(
            str(checkpoint), "-o", str(output), "--n", "4", "--seed", "7", "--sink", "2",
            "--window", "5", "--evaluate", "4", "--sparsities", ".5,1", "--max-new-tokens", "6",
            "--set", "answers=1", "--set", "until=.5",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        files.append(load_profile(output))
    profile, again = files
    assert profile == again
    assert (profile.sink, profile.window) == (2, 5)
    assert profile.model.id == checkpoint.name
    assert profile.model.num_layers == NUM_LAYERS
    assert profile.provenance.method == "greedy"
    assert profile.provenance.seed == 7
    assert profile.provenance.config["n"] == 4
    assert str(checkpoint.parent) not in output.read_text()
    assert profile.provenance.config["window"] == 5
    assert profile.provenance.config["settings"] == {
        "answers": 1,
        "tokens": 65536,
        "until": 0.5,
        "batch_tokens": 4096,
    }
    assert set(profile.provenance.versions) == {"rlkv-vllm", "torch", "transformers"}
    assert "own answers (greedy)" in (profile.provenance.data or "")
    assert "2 correct" in (profile.provenance.data or "")
    assert profile.provenance.config["temperature"] == 0
    assert "answers: greedy (generation_config.json of the model does not say to" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert [row.sparsity for row in profile.evaluation] == [0, 0.5, 1]
    assert all(
        row.n == 4 and row.accuracy == row.full_accuracy == 0.5 for row in profile.evaluation
    )
    assert profile.recommended_sparsity is None
    assert "recommended sparsity: none (the largest one that is at least measured, over 200 " in (
        result.output
    )


class Calls:
    """A function, and how often it was called."""

    def __init__(self, function: Any) -> None:
        self.function, self.number = function, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.number += 1
        return self.function(*args, **options)


def served(checkpoint: Path, **config: Any) -> None:
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def sampled(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as one that asks for sampling."""
    path = tmp_path / "sampled"
    shutil.copytree(checkpoint, path)
    served(path, do_sample=True, temperature=0.8, top_k=30, repetition_penalty=1.1)
    return path


SHORT = ("--n", "4", "--sink", "2", "--window", "5", "--max-new-tokens", "6", "--set", "until=.2")


def test_answers_are_sampled_as_served(
    sampled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "get_task", lambda name: WordTask())
    output = tmp_path / "p.json"
    seen: list[tuple[Sampling, int]] = []

    def record(*args: Any, **options: Any) -> Any:
        seen.append((options["sampling"], options["samples"]))
        return solve(*args, **options)

    monkeypatch.setattr(own_answers, "solve", record)
    monkeypatch.setattr(by_mask, "solve", record)
    more = ("--samples", "3", "--evaluate", "2", "--sparsities", "1")
    result = invoke(str(sampled), "-o", str(output), *SHORT, *more)
    assert result.exit_code == 0, result.output
    words = "temperature 0.8, top-k 30, repetition penalty 1.1"
    assert f"answers: {words} (generation_config.json of the model)" in result.stderr
    asked = Sampling(max_tokens=6, temperature=0.8, top_k=30, repetition_penalty=1.1)
    assert {(one.model_copy(update={"seed": 0}), samples) for one, samples in seen} == {(asked, 3)}
    made = load_profile(output)
    assert made.provenance.config["temperature"] == 0.8
    assert made.provenance.config["repetition_penalty"] == 1.1
    assert made.provenance.config["samples"] == 3
    data = made.provenance.data or ""
    assert f"own answers ({words}) to 4 problems" in data
    assert "3 answers each), of which the 12 correct ones" in data
    assert [
        (row.temperature, row.top_k, row.repetition_penalty, row.samples) for row in made.evaluation
    ] == [(0.8, 30, 1.1, 3)] * 2

    result = invoke(str(sampled), "-o", str(output), *SHORT, "--temperature", "0")
    assert "answers: greedy (--temperature 0)" in result.stderr
    result = invoke(str(sampled), "-o", str(output), *SHORT, "--top-k", "7")
    assert "top-k 7, repetition penalty 1.1 (--top-k; else generation_config" in result.stderr
    more = ("--top-k", "7", "--min-p", ".1", "--repetition-penalty", "1")
    result = invoke(str(sampled), "-o", str(output), *SHORT, *more)
    assert "answers: temperature 0.8, top-k 7, min-p 0.1 (--top-k, --min-p" in result.stderr


def test_answers_to_a_problem_differ_and_do_not_depend_on_a_kill(
    sampled: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(sampled, dtype=torch.float32).eval()
    task = WordTask(accept=(True, False))
    problems = task.problems(5, 0)
    options: dict[str, Any] = {
        "sampling": Sampling(max_tokens=6), "samples": 3, "batch_size": 6,
        "report": lambda *_: None,
    }  # fmt: skip
    written: list[dict[str, Any]] = []
    states: list[list[dict[str, Any]]] = []
    found = own_answers.write_answers(
        model, tokenizer, task, problems, written=written,
        save=lambda: states.append(written.copy()), **options,
    )  # fmt: skip
    assert [len(state) for state in states] == [6, 12, 15]  # two problems at once
    assert found.count == 15
    assert [problem.answer for problem in found.problems] == ["yes"] * 9
    assert [s.prompt_ids for s in found.samples[:3]] == [found.samples[0].prompt_ids] * 3
    assert len({tuple(s.completion_ids) for s in found.samples[:3]}) == 3
    assert len({answer["answer"] for answer in written}) > 10
    again = own_answers.write_answers(
        model, tokenizer, task, problems, written=states[0], save=lambda: None, **options
    )
    assert again == found


def test_a_killed_run_continues_with_the_same_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "get_task", lambda name: WordTask())
    config = run.ScoreConfig(model=str(checkpoint), n=4, sink=2, window=5, max_new_tokens=6)
    expected = run.make_profile(config)
    asked: list[str] = []
    evaluate = SplitLoss._evaluate

    def counted(self: SplitLoss, streaming: Any) -> float:
        asked.append(name_of(streaming))
        return evaluate(self, streaming)

    monkeypatch.setattr(SplitLoss, "_evaluate", counted)
    monkeypatch.setattr(run, "load_model", count_calls := Calls(run.load_model))
    work = tmp_path / "p.json.work.json"

    def killed(stage: str, done: int, total: int, state: str = "") -> None:
        if (stage, done) == ("scoring", 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.make_profile(config, killed, work=work)
    before = len(asked)
    assert before == 11
    said: list[str] = []
    monkeypatch.setattr(own_answers, "solve", None)  # all answers are there
    assert run.make_profile(config, say=said.append, work=work).gates == expected.gates
    assert f"continues from {work}: 4 of 4 answers" in said
    assert len(asked) == len({*asked}) > before
    loaded = count_calls.number
    for change in ({"seed": 1}, {"window": 6}, {"settings": {"answers": 3}}, {"max_new_tokens": 7}):
        with pytest.raises(RlkvError) as error:
            run.make_profile(replace(config, **change), work=work)
        assert_one_line(error.value, str(work), "other settings", "--fresh")
    assert count_calls.number == loaded  # refused before the model is loaded
    monkeypatch.setattr(own_answers, "solve", solve)
    run.make_profile(replace(config, seed=1), work=work, fresh=True)


def test_evaluation_leaves_out_what_was_scored(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"+{i}", "answer": str(i)}) for i in range(10)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(lines))
    task = get_task(str(path))
    scored = task.problems(6, 0)
    fresh = fresh_problems(task, 8, 1, scored, "--n or --evaluate")
    assert 2 <= len(fresh) <= 4
    assert not any(problem in scored for problem in fresh)
    with pytest.raises(RlkvError) as error:
        fresh_problems(task, 10, 1, task.problems(10, 0), "--n or --evaluate")
    assert_one_line(error.value, "task sums", "--n or --evaluate")


def test_score_needs_one_correct_answer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "get_task", lambda name: WordTask(accept=(False,)))
    output = tmp_path / "p.json"
    result = invoke(str(checkpoint), "-o", str(output), "--n", "2", "--max-new-tokens", "3")
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, "none of its 2 answers", "100% were cut off")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--sparsities", "0,x"], ["--sparsities", "0,x", "from 0 to 1"]),
        (["--sparsities", "0,1.5"], ["1.5", "[0, 1]"]),
        (["--n", "0"], ["--n 0", "at least 1"]),
        (["--window", "0"], ["--window 0", "at least 1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens 0"]),
        (["--method", "guess"], ["--method guess", "head-importance"]),
        (["--task", "no-such-task"], ["no-such-task"]),
        (["--set", "steps=3"], ["--set steps", "greedy", "answers (64)", "until (1.0)"]),
        (["--set", "until=0"], ["--set: until: ", "greater than 0"]),
        (["--samples", "0"], ["--samples 0", "at least 1"]),
        (["--samples", "2"], ["--samples 2", "greedy decoding", "--temperature above 0"]),
        (["--temperature", "0", "--top-k", "5"], ["--top-k", "--temperature 0"]),
        (["--temperature", "-1"], ["--temperature -1", "greater than or equal to 0"]),
        (["--temperature", "1", "--top-p", "2"], ["--top-p 2", "less than or equal to 1"]),
        (["--set", "path_steps"], ["--set path_steps", "key=value"]),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, args: list[str], parts: list[str]) -> None:
    result = invoke("embedded", "-o", str(tmp_path / "p.json"), *args)
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_output_is_refused(tmp_path: Path) -> None:
    result = invoke("embedded", "-o", str(tmp_path))
    assert isinstance(result.exception, RlkvError)
    assert_one_line(result.exception, f"--output {tmp_path}")
