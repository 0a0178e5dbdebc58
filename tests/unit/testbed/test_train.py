"""Training of the embedded reasoner in miniature, and the weights that are shipped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlkv_vllm import models
from rlkv_vllm.answers import Sampling
from rlkv_vllm.cli.testbed import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.tasks import get_task
from rlkv_vllm.testbed.export import MAX_COMPLETION, measure
from rlkv_vllm.testbed.tokenizer import build_tokenizer
from rlkv_vllm.testbed.train import CHECKPOINT, TestbedTrainer, TrainingConfig, TrainingState, run
from tests.support.profiles import assert_one_line

# Every size is mastered at once, so that few steps pass through the whole curriculum.
TINY = TrainingConfig(
    seed=3,
    max_steps=100,
    batch_tokens=150,
    warmup_steps=2,
    first_scale=0.25,
    scale_step=0.75,
    master_accuracy=-1.0,
    decay_accuracy=-1.0,
    decay_steps=4,
    checkpoint_steps=5,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TestbedTrainer, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return run(TINY, folder), folder


def test_the_curriculum_grows_decays_and_ends(
    uninterrupted: tuple[TestbedTrainer, Path],
) -> None:
    state = uninterrupted[0].state
    assert (state.step, state.scale, state.decay_start) == (24, 1.0, 20)
    assert state.is_done(TINY)
    assert state.expected_steps(TINY) == 24


def test_killed_and_resumed_it_ends_in_the_same_state(
    uninterrupted: tuple[TestbedTrainer, Path], tmp_path: Path
) -> None:
    def kill(state: TrainingState) -> None:
        if state.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path, report=kill)
    seen: list[int] = []
    resumed = run(TINY, tmp_path, resume=True, report=lambda state: seen.append(state.step))
    whole, folder = uninterrupted
    assert seen[0] == 11
    assert resumed.state == whole.state
    ours, theirs = load_file(tmp_path / CHECKPOINT), load_file(folder / CHECKPOINT)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.0.") for name in ours)
    assert any(name.startswith("optimizer.1.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_checkpoint_is_not_overwritten_or_mistaken(
    uninterrupted: tuple[TestbedTrainer, Path], tmp_path: Path
) -> None:
    folder = uninterrupted[1]
    with pytest.raises(RlkvError, match="holds an earlier run: give --resume"):
        run(TINY, folder)
    with pytest.raises(RlkvError, match=r"other settings \(seed 3 there, 4 here\)"):
        run(replace(TINY, seed=4), folder, resume=True)
    content = (folder / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(RlkvError, match=r"checkpoint\.safetensors: no checkpoint of"):
        run(TINY, tmp_path, resume=True)


def test_the_data_depend_on_seed_and_step_alone() -> None:
    one, two = TestbedTrainer(TINY), TestbedTrainer(TINY)
    one.step()
    two.state = replace(one.state)
    assert all(torch.equal(a, b) for a, b in zip(one.batch(), two.batch(), strict=True))
    inputs, labels, weights = one.batch()
    assert (weights == 1).all()
    assert inputs.numel() <= TINY.batch_tokens
    supervised = labels != -100
    assert torch.equal(inputs[supervised], labels[supervised])
    tokenizer = one.tokenizer
    for row, wanted in zip(labels, supervised, strict=True):
        text = tokenizer.decode(row[wanted])
        assert text.startswith("<think> ")
        assert text.endswith("<|end|>")


def test_injected_errors_are_no_targets() -> None:
    trainer = TestbedTrainer(TrainingConfig.of("audit", seed=3, first_scale=0.3))
    inputs, labels, weights = trainer.batch()
    tokenizer = trainer.tokenizer
    assert inputs.numel() <= trainer.config.batch_tokens
    assert (inputs == tokenizer.convert_tokens_to_ids("audit")).sum() == len(inputs)
    heavy = {tokenizer.decode(token) for token in inputs[weights > 1]}
    assert heavy >= {"start", "done"}
    assert all(re.fullmatch(r"start|done|[Lv]?\d+[.=]?", word) for word in heavy)
    masked = 0
    for ids, wanted in zip(inputs.tolist(), labels.tolist(), strict=True):
        words = tokenizer.convert_ids_to_tokens(ids)
        thought = range(words.index("<think>"), words.index("<|end|>") + 1)
        untaught = [i for i in thought if wanted[i] == -100]
        masked += len(untaught)
        # What is masked is a name, a weight or a sum: what a model looks up or computes.
        assert all(re.fullmatch(r"[a-z]+pus|[+]?\d", words[i]) for i in untaught)
        assert all(wanted[i] in (-100, ids[i]) for i in thought)
    assert masked > 0


def test_options_of_a_family() -> None:
    assert TrainingConfig.of(None, seed=2) == TrainingConfig(seed=2)
    audit = TrainingConfig.of("audit", decay_steps=7)
    assert (audit.family, audit.batch_tokens, audit.decay_steps) == ("audit", 3000, 7)


def test_steps_lower_the_loss() -> None:
    trainer = TestbedTrainer(replace(TINY, batch_tokens=400, master_accuracy=2.0))
    losses = []
    for _ in range(10):
        trainer.step()
        losses.append(trainer.state.loss)
    assert losses[0] > 5
    assert losses[-1] < losses[0] - 0.2


def test_updates_of_hidden_weights_have_singular_values_near_one() -> None:
    muon = TestbedTrainer(TINY)._optimizers[0]
    assert isinstance(muon, torch.optim.Muon)
    generator = torch.Generator().manual_seed(0)
    # A random square matrix has singular values near zero, which Muon leaves small.
    weights = [w for w in muon.param_groups[0]["params"] if max(w.shape) >= 2 * min(w.shape)]
    before = [weight.detach().clone() for weight in weights]
    for i, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (i % 7 - 3)
    muon.step()
    assert len(weights) > 10
    for weight, old in zip(weights, before, strict=True):
        update = old * (1 - TINY.muon_lr * 0.01) - weight.detach()
        # Of the size of an AdamW update: 0.2 is its usual root mean square.
        values = torch.linalg.svdvals(update) / (TINY.muon_lr * 0.2 * max(weight.shape) ** 0.5)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_a_checkpoint_of_other_optimizers_is_refused(
    uninterrupted: tuple[TestbedTrainer, Path], tmp_path: Path
) -> None:
    content = (uninterrupted[1] / CHECKPOINT).read_bytes()
    assert content.count(b"Muon") == 1
    (tmp_path / CHECKPOINT).write_bytes(content.replace(b"Muon", b"Noum"))
    with pytest.raises(RlkvError, match=r"checkpoint\.safetensors: of another version"):
        run(TINY, tmp_path, resume=True)


def test_the_train_command_writes_a_model(tmp_path: Path) -> None:
    output = tmp_path / "model"
    arguments = ["train", "--output", str(output), "--max-steps", "2", "--measure", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "of 1 fresh problems" in result.output
    assert result.stdout.splitlines()[-1] == f"next: rlkv score {output} -o profile.json"
    assert not (output / CHECKPOINT).exists()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["run"]["state"]["step"] == 2
    # Untrained, it solves nothing in bfloat16, so it is kept in float32.
    assert metrics["weights"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.float32
    assert load_model_fingerprint(str(output)).num_kv_heads == 4
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, RlkvError)
    assert "holds a finished model" in str(again.exception)


def test_a_run_may_start_from_a_finished_model(tmp_path: Path) -> None:
    shipped = load_file(models.model_dir() / "model.safetensors")
    random = TestbedTrainer(TrainingConfig.of("audit"))
    started = TestbedTrainer(TrainingConfig.of("audit", init="embedded"))
    n = len(shipped["model.embed_tokens.weight"])
    before = dict(random.model.named_parameters())
    for name, weight in started.model.named_parameters():
        assert torch.equal(weight[: len(shipped[name])], shipped[name].float())
        if "embed" in name:
            assert len(weight) == n + 1  # the word `audit`
            assert torch.equal(weight[n:], before[name][n:])


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def refuse(*parts: str) -> None:
        with pytest.raises(RlkvError) as error:
            TestbedTrainer(TrainingConfig(init=str(tmp_path)))
        assert_one_line(error.value, f"--init {tmp_path}", *parts)

    refuse("no model of `rlkv testbed train`", "finished run")
    build_tokenizer(2048).save_pretrained(tmp_path)
    weights = load_file(models.model_dir() / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:7].clone()}, tmp_path / "model.safetensors")
    refuse(f"{name} is of shape (7, 128), this model needs (384, 128)")
    build_tokenizer(2048, "audit").save_pretrained(tmp_path)
    refuse("its vocabulary is another one (audit is word")


def test_the_train_command_refuses_an_unknown_family(tmp_path: Path) -> None:
    arguments = ["train", "--family", "golf", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, RlkvError)
    assert "--family golf: unknown, choose one of chain, hops" in str(result.exception)


def test_a_long_family_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MAX_COMPLETION, "audit", 4)
    trainer = TestbedTrainer(TrainingConfig.of("audit"))
    shares = measure(trainer.model, trainer.tokenizer, streaming=False, family="audit", n=2)
    assert shares == {"audit": 0.0, "output_tokens": 4.0}


# --- shipped weights -------------------------------------------------------------------


def solved(dtype: torch.dtype, split: HeadSplit | None) -> int:
    folder = models.model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = get_task("embedded")
    problems = task.problems(10, seed=1)
    sampling = Sampling(max_tokens=176, temperature=0)
    return sum(solve(model, tokenizer, task, problems, split=split, sampling=sampling).correct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_weights_solve_problems(dtype: torch.dtype) -> None:
    assert solved(dtype, None) >= 9


def test_the_shipped_weights_need_their_whole_cache() -> None:
    streaming = HeadSplit([()] * 5, *models.EMBEDDED_SPAN)
    assert solved(torch.float32, streaming) <= 3


def test_the_shipped_folder() -> None:
    folder = models.model_dir()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5 * 2**20
    fingerprint = load_model_fingerprint(str(folder))
    assert fingerprint.id == "embedded"  # not the name of its folder
    shape = (fingerprint.num_layers, fingerprint.num_query_heads, fingerprint.num_kv_heads)
    assert (*shape, fingerprint.head_dim, fingerprint.model_type) == (5, 8, 4, 32, "qwen3")
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy = metrics["accuracy"][metrics["weights"]]
    assert accuracy["full"]["embedded"] >= 0.95
    assert accuracy["streaming"]["embedded"] < 0.20
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == TestbedTrainer(TINY).tokenizer.get_vocab()


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "__file__", str(tmp_path / "models.py"))
    with pytest.raises(RlkvError, match=r"weights: no model\.safetensors .*rlkv testbed train"):
        models.model_dir()
