"""The model's own correct answers, which scorers and searches work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.hf.answer_loss import Sample
from rlkv_vllm.hf.answers import solve
from rlkv_vllm.tasks import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OwnAnswers:
    """Correct answers and the problem of each.

    `count` is how many answers were written, `cut` how many of them the token limit cut off.
    """

    problems: list[Problem]
    samples: list[Sample]
    count: int
    cut: int


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    samples: int,
    batch_size: int,
    written: list[dict[str, Any]],
    save: Callable[[], None],
    report: Callable[[int, int, str], None],
) -> OwnAnswers:
    """Let the model answer with its full cache, `samples` times per problem.

    Args:
        model: a Hugging Face decoder; ungated, and unchanged afterwards.
        tokenizer: with a chat template.
        task: scores the answers.
        problems: to answer.
        sampling: how tokens are chosen; every batch has a seed of its own.
        samples: answers per problem.
        batch_size: answers written together.
        written: answers as JSON values, `samples` per problem in a row; those of the first problems
            may be there already, the others are appended.
        save: called whenever `written` has grown.
        report: called with (answers written, answers in all, "N solved").
    """
    total = samples * len(problems)
    step = max(1, batch_size // samples)
    for start in range(len(written) // samples, len(problems), step):
        before = sum(answer["is_correct"] for answer in written)
        result = solve(
            model,
            tokenizer,
            task,
            problems[start : start + step],
            sampling=sampling.model_copy(update={"seed": (sampling.seed + start) % 2**31}),
            samples=samples,
            batch_size=batch_size,
        )
        written += [
            {
                # A line of the file each.
                "prompt": " ".join(map(str, answer.prompt_ids)),
                "answer": " ".join(map(str, answer.token_ids)),
                "is_correct": answer.is_correct,
                "hit_cap": answer.hit_cap,
            }
            for answer in result.answers
        ]
        save()
        report(len(written), total, f"{before + result.solved} solved")
    correct = [(i, answer) for i, answer in enumerate(written) if answer["is_correct"]]
    return OwnAnswers(
        [problems[i // samples] for i, _ in correct],
        [Sample(_ids(answer["prompt"]), _ids(answer["answer"])) for _, answer in correct],
        len(written),
        sum(answer["hit_cap"] for answer in written),
    )


def _ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]
