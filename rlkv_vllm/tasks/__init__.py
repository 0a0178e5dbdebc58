"""Problems with a final answer that can be checked, and the scores of answers."""

from __future__ import annotations

from pathlib import Path

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.tasks import dataset, gym
from rlkv_vllm.tasks.files import read_file_task
from rlkv_vllm.tasks.grading import output_text
from rlkv_vllm.tasks.reward import RewardedTask
from rlkv_vllm.tasks.rows import Columns
from rlkv_vllm.tasks.task import (
    Problem,
    Task,
    count_problems,
    is_solved,
    problems_digest,
    skip_note,
)
from rlkv_vllm.tasks.testbed import NAMES, TestbedTask

__all__ = [
    "Problem",
    "Task",
    "count_problems",
    "get_task",
    "is_solved",
    "output_text",
    "problems_digest",
    "skip_note",
]


def get_task(
    name: str,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    split: str = "train",
    reward: str | None = None,
) -> Task:
    """The task of that name.

    Args:
        name: a task family of the testbed, "embedded" for all of the shipped model, `gym:NAME`
            of reasoning-gym, `datasets:ORG/NAME`, `datasets:ORG/NAME/CONFIG` or `datasets:PATH`
            of Hugging Face's `datasets`, or the path of a `.jsonl` file.
        prompt_column: of the questions in a file or data set.
        answer_column: of the answers in a file or data set.
        split: which part of a data set.
        reward: `package.module:function` to score with instead of the task's own scoring.

    Raises:
        RlkvError: there is no such task, its data are bad, its library is not installed, or the
            reward cannot be called.
    """
    columns = Columns(prompt_column, answer_column, with_others=reward is not None)
    task: Task
    if name in NAMES:
        task = TestbedTask(name)
    elif name.startswith(gym.PREFIX):
        task = gym.GymTask(name.removeprefix(gym.PREFIX))
    elif name.startswith(dataset.PREFIX):
        task = dataset.read_dataset_task(name.removeprefix(dataset.PREFIX), split, columns)
    elif name.endswith(".jsonl") or Path(name).is_file():
        task = read_file_task(Path(name), columns)
    else:
        raise RlkvError(
            f"task {one_line(name)}: unknown, choose one of {', '.join(NAMES)}, or give gym:NAME, "
            "datasets:NAME, or the path of a .jsonl file with prompt and answer"
        )
    return task if reward is None else RewardedTask(task, reward)
