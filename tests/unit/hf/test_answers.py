"""Answers by mask: repetition penalty and several samples as in transformers."""

from __future__ import annotations

import pytest
import torch

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.answers import Sampling
from rlkv_vllm.hf.answers import HeadSplit, prompt_ids, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.tasks import get_task


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_repetition_penalty_as_in_transformers(penalty: float) -> None:
    """Prompts of different lengths; answers that end early, are cut off, leave the batch."""
    model, tokenizer, _ = load_model("embedded")
    task = get_task("embedded")
    problems = task.problems(8, seed=5)
    found = solve(
        model,
        tokenizer,
        task,
        problems,
        sampling=Sampling(max_tokens=50, temperature=0, repetition_penalty=penalty),
        batch_size=4,
    )
    prompts = prompt_ids(tokenizer, problems)
    assert len(set(map(len, prompts))) > 1
    for prompt, answer in zip(prompts, found.answers, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=50,
            do_sample=False,
            repetition_penalty=penalty,
        )
        assert answer.token_ids == expected[0, len(prompt) :].tolist()


def test_padding_is_no_token_of_the_prompt() -> None:
    """A strong penalty on what was seen: a row's answer does not depend on its neighbours."""
    model, tokenizer, _ = load_model("embedded")
    task = get_task("embedded")
    problems = sorted(task.problems(8, seed=5), key=lambda problem: len(problem.messages[0]))
    sampling = Sampling(max_tokens=20, temperature=0, repetition_penalty=2.0)
    alone = [
        solve(model, tokenizer, task, [problem], sampling=sampling).answers[0].token_ids
        for problem in problems
    ]
    together = solve(model, tokenizer, task, problems, sampling=sampling)
    assert [answer.token_ids for answer in together.answers] == alone


def test_samples_of_a_problem_differ_and_stand_in_a_row() -> None:
    model, tokenizer, fingerprint = load_model("embedded")
    task = get_task("embedded")
    gates = [[1.0] * fingerprint.num_kv_heads] * fingerprint.num_layers
    found = solve(
        model,
        tokenizer,
        task,
        task.problems(3, seed=5),
        split=HeadSplit(allocate(gates, 0.5).full, 4, 16),
        sampling=Sampling(max_tokens=30, temperature=5, seed=3),
        samples=4,
    )
    assert (found.n, found.samples, len(found.answers)) == (3, 4, 12)
    for start in (0, 4, 8):
        own = found.answers[start : start + 4]
        assert len({tuple(answer.prompt_ids) for answer in own}) == 1
        assert len({tuple(answer.token_ids) for answer in own}) > 1
