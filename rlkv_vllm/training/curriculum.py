"""Self-distillation sampling: the problems that the ungated model solves.

Answers are written to disk batch by batch, so that a killed run continues where it stopped; the
kept set has a hash that goes into the profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.hf.answers import solve
from rlkv_vllm.tasks import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_FILE, SUMMARY_FILE, PARTIAL_FILE = (
    "curriculum.jsonl",
    "curriculum.json",
    "curriculum.partial.{rank}.jsonl",
)


@dataclass(frozen=True)
class Curriculum:
    """The problems to train on.

    Attributes:
        problems: those that the ungated model solved, in the order they were drawn.
        tried: problems that it tried.
        mean_tokens: mean length of its answers (tokens).
        capped_share: share of the answers that the token limit cut off.
        longest: longest prompt and correct answer together (tokens).
        sha256: of the kept problems.
    """

    problems: list[Problem]
    tried: int
    mean_tokens: float
    capped_share: float
    longest: int
    sha256: str


@dataclass(frozen=True)
class Share:
    """The part of the work that one process does.

    Attributes:
        rank: this process.
        world: how many there are.
        wait: returns when all processes have called it.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


def make_curriculum(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    output: Path,
    *,
    settings: Mapping[str, Any],
    n: int,
    keep: int | None,
    sampling: Sampling,
    batch_size: int,
    share: Share = Share(),
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Curriculum:
    """Answer `n` problems with the ungated model and keep the solved ones.

    Reads what an earlier call with the same `settings` left in `output`, finished or not.

    Args:
        model: ungated.
        tokenizer: with a chat template.
        task: gives and checks the problems.
        output: folder of `curriculum.jsonl` (kept problems) and `curriculum.json` (figures).
        settings: all that decides the result, plain values; what is on disk must match.
        n: problems to try.
        keep: stop as soon as all processes together have solved so many; None tries all.
        sampling: of the answers; its seed is that of the problems too.
        batch_size: problems answered together.
        share: this process's part, when several work on one curriculum.
        report: called with (problems answered, problems in all).

    Raises:
        RlkvError: if nothing is solved, or the files in `output` have other settings.
    """
    made_with = {**settings, "n": n, "keep": keep, "seed": sampling.seed}
    wanted: dict[str, Any] = json.loads(json.dumps(made_with))
    summary = output / SUMMARY_FILE
    if summary.exists():
        return _load(output, wanted)
    problems = task.problems(n, sampling.seed)
    mine = list(enumerate(problems))[share.rank :: share.world]
    partial = output / PARTIAL_FILE.format(rank=share.rank)
    done = _read_partial(partial, wanted | {"world": share.world})
    left = [(i, problem) for i, problem in mine if i not in done]

    def is_enough() -> bool:
        """Whether all processes together need no more batches; alike on all of them."""
        if keep is None:
            return not left
        share.wait()
        rows = [row for rank in range(share.world) for row in _rows(output, rank)]
        share.wait()  # nobody may write before all have read
        return len(rows) == len(problems) or sum(row["solved"] for row in rows) >= keep

    with partial.open("a", encoding="utf-8") as file:
        while not is_enough():
            batch, left = left[:batch_size], left[batch_size:]
            if not batch:  # others still have some
                continue
            result = solve(
                model,
                tokenizer,
                task,
                [problem for _, problem in batch],
                # Random numbers of its own for every batch: a continued run samples the same ones.
                sampling=sampling.model_copy(update={"seed": sampling.seed + batch[0][0]}),
                batch_size=batch_size,
            )
            for (i, _), answer in zip(batch, result.answers, strict=True):
                row = {
                    "index": i,
                    "solved": answer.is_correct,
                    "tokens": len(answer.token_ids),
                    "total": len(answer.prompt_ids) + len(answer.token_ids),
                    "capped": answer.hit_cap,
                }
                file.write(json.dumps(row) + "\n")
            file.flush()
            report(len(mine) - len(left), len(mine))
    share.wait()
    if share.rank == 0:
        rows: dict[int, dict[str, Any]] = {}
        for rank in range(share.world):
            path = output / PARTIAL_FILE.format(rank=rank)
            rows |= _read_partial(path, wanted | {"world": share.world})
        _finish(output, problems, rows, wanted)
        for rank in range(share.world):
            (output / PARTIAL_FILE.format(rank=rank)).unlink()
    share.wait()
    return _load(output, wanted)


def _finish(
    output: Path,
    problems: list[Problem],
    rows: Mapping[int, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    solved = [i for i in sorted(rows) if rows[i]["solved"]][: settings["keep"]]
    if not solved:
        capped = sum(row["capped"] for row in rows.values()) / len(rows)
        raise RlkvError(
            f"curriculum: the model solves none of {len(rows)} problems ({capped:.0%} of the "
            "answers were cut off): choose a task that it can solve, or raise "
            "trainer.max_completion_length"
        )
    text = "".join(_line(problems[i]) for i in solved)
    write_text_atomic(output / KEPT_FILE, text)
    figures = {
        "tried": len(rows),
        "kept": len(solved),
        "mean_tokens": sum(row["tokens"] for row in rows.values()) / len(rows),
        "capped_share": sum(row["capped"] for row in rows.values()) / len(rows),
        "longest": max(rows[i]["total"] for i in solved),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "settings": dict(settings),
    }
    # Last: where it is, the curriculum is finished.
    write_text_atomic(output / SUMMARY_FILE, json.dumps(figures, indent=2) + "\n")


def _load(output: Path, settings: Mapping[str, Any]) -> Curriculum:
    path = output / SUMMARY_FILE
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        text = (output / KEPT_FILE).read_text(encoding="utf-8")
        made = figures["settings"]
        kept = [json.loads(line) for line in text.split("\n") if line]
        problems = [Problem(row["messages"], row["answer"], row["extra"]) for row in kept]
        curriculum = Curriculum(
            problems,
            figures["tried"],
            figures["mean_tokens"],
            figures["capped_share"],
            figures["longest"],
            figures["sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RlkvError(
            f"{path}: no curriculum of `rlkv train` ({error}): delete curriculum.* in {output}"
        ) from error
    _require_same(path, made, settings)
    if hashlib.sha256(text.encode()).hexdigest() != curriculum.sha256:
        raise RlkvError(
            f"{output / KEPT_FILE}: was changed after it was made: delete curriculum.* in "
            f"{output} to make it again"
        )
    return curriculum


def _read_partial(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Rows of an unfinished curriculum by index; begins the file if it is not there."""
    if not path.exists():
        write_text_atomic(path, json.dumps({"settings": dict(settings)}) + "\n")
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        _require_same(path, json.loads(lines[0])["settings"], settings)
        # The last line is empty, or cut off by a kill.
        rows = [json.loads(line) for line in lines[1:-1]]
    except (ValueError, KeyError, TypeError) as error:
        raise RlkvError(
            f"{path}: cannot be continued ({error}): delete it to begin the curriculum again"
        ) from error
    write_text_atomic(path, "".join(line + "\n" for line in lines[:-1]))
    return {row["index"]: row for row in rows}


def _rows(output: Path, rank: int) -> list[dict[str, Any]]:
    """Rows of the unfinished part of a process, which may be another one."""
    path = output / PARTIAL_FILE.format(rank=rank)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]


def _require_same(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [key for key in wanted if made.get(key) != wanted[key]]
    if differing:
        was = ", ".join(f"{key} {made.get(key)}" for key in differing)
        now = ", ".join(f"{key} {wanted[key]}" for key in differing)
        raise RlkvError(
            f"{path}: made with {was}, now {now}: choose another --output, or delete "
            f"curriculum.* in {path.parent}"
        )


def _line(problem: Problem) -> str:
    row = {"messages": problem.messages, "answer": problem.answer, "extra": dict(problem.extra)}
    return json.dumps(row, ensure_ascii=False) + "\n"
