"""Self-distillation sampling: the problems that the ungated model solves.

Answers are written to disk batch by batch, so that a killed run continues where it stopped; the
kept set has a hash that goes into the profile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import read_json_object
from rlkv_vllm.store import Store
from rlkv_vllm.tasks import Problem
from rlkv_vllm.training.solver import Solver

if TYPE_CHECKING:
    from accelerate import PartialState

KEPT_FILE, SUMMARY_FILE = "curriculum.jsonl", "curriculum.json"
PARTIAL_FILE = "curriculum.partial.{rank}.json"
FORMAT = "rlkv curriculum 1"


@dataclass(frozen=True)
class Curriculum:
    """The problems that the ungated model solved, in the order of the task, and figures of them.

    `longest` is the longest prompt and correct answer together (tokens); mean length and
    `capped_share` (cut off by the token limit) are of the answers to all problems `tried`.
    """

    problems: list[Problem]
    tried: int
    mean_tokens: float
    capped_share: float
    longest: int
    sha256: str


def make_curriculum(
    solver: Solver,
    output: Path,
    *,
    n: int,
    keep: int | None,
    sampling: Sampling,
    batch_size: int,
    processes: PartialState,
    report: Callable[[int, int, str], None] = lambda done, total, state: None,
) -> Curriculum:
    """Answer `n` problems with the ungated model and keep the solved ones.

    Reads what an earlier call with the same settings left in `output`, finished or not.

    `processes` share the work and stop as soon as they have solved `keep` together; None tries all.
    The seed of `sampling` is that of the problems too. `report` is called with (problems answered,
    problems in all, "N solved").

    Raises:
        RlkvError: nothing is solved, or the files in `output` have other settings.
    """
    draw = sampling.model_dump(include={"temperature", "top_p", "top_k"})
    draw |= sampling.model_dump(include={"min_p", "repetition_penalty"}, exclude_defaults=True)
    wanted = {
        **solver.settings,
        "draw": None if sampling.is_greedy else draw,  # the name in earlier runs
        "max_new_tokens": sampling.max_tokens,
        "batch_size": batch_size,
        "n": n,
        "keep": keep,
        "seed": sampling.seed,
    }
    rank, world = processes.process_index, processes.num_processes
    summary = _store(output / SUMMARY_FILE, wanted, rank == 0)
    if summary.content:
        return _load(summary)
    problems = solver.task.problems(n, sampling.seed)
    mine = list(enumerate(problems))[rank::world]
    files = [output / PARTIAL_FILE.format(rank=one) for one in range(world)]
    partial = _store(files[rank], {**wanted, "world": world})
    rows: list[dict[str, Any]] = partial.content.setdefault("rows", [])
    partial.save()
    left = mine[len(rows) :]

    def all_rows() -> list[dict[str, Any]]:
        """Rows of all processes; alike on all of them."""
        processes.wait_for_everyone()
        found = [row for file in files for row in read_json_object(file)["rows"]]
        processes.wait_for_everyone()  # before one of them writes again
        return found

    def is_enough() -> bool:
        if keep is None:
            return not left
        found = all_rows()
        return len(found) == len(problems) or sum(row["solved"] for row in found) >= keep

    while not is_enough():
        batch, left = left[:batch_size], left[batch_size:]
        if not batch:  # others still have some
            continue
        # Random numbers of its own for every batch: a continued run samples the same ones.
        seeded = sampling.model_copy(update={"seed": sampling.seed + batch[0][0]})
        asked = [problem for _, problem in batch]
        result = solver.solve(asked, sampling=seeded, batch_size=batch_size)
        rows += [
            {
                "index": i,
                "solved": answer.is_correct,
                "tokens": len(answer.token_ids),
                "total": len(answer.prompt_ids) + len(answer.token_ids),
                "capped": answer.hit_cap,
            }
            for (i, _), answer in zip(batch, result.answers, strict=True)
        ]
        partial.save()
        solved = f"{sum(row['solved'] for row in rows)} solved"
        report(len(rows), len(mine), solved)
    if left:  # enough are solved
        report(len(rows), len(rows), solved)
    found = all_rows()
    if rank == 0:
        _finish(summary, problems, found, keep)
        for file in output.glob(PARTIAL_FILE.format(rank="*")):
            file.unlink()
    processes.wait_for_everyone()
    return _load(_store(output / SUMMARY_FILE, wanted))


def _store(path: Path, settings: Mapping[str, Any], is_writer: bool = True) -> Store:
    return Store(
        path,
        FORMAT,
        settings,
        is_writer=is_writer,
        flag="",
        fix=f"choose another --output, or delete curriculum.* in {path.parent}",
    )


def _finish(
    summary: Store, problems: list[Problem], rows: list[dict[str, Any]], keep: int | None
) -> None:
    capped = sum(row["capped"] for row in rows) / len(rows)
    solved = sorted((row for row in rows if row["solved"]), key=lambda row: row["index"])[:keep]
    if not solved:
        raise RlkvError(
            f"curriculum: the model solves none of {len(rows)} problems ({capped:.0%} of the "
            "answers were cut off): choose a task that it can solve, or raise the limit of tokens "
            "(trainer.max_completion_length, --max-new-tokens)"
        )
    kept = [problems[row["index"]] for row in solved]
    plain = [{"messages": p.messages, "answer": p.answer, "extra": dict(p.extra)} for p in kept]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain).encode()
    summary.content |= {
        "tried": len(rows),
        "kept": len(solved),
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "capped_share": capped,
        "longest": max(row["total"] for row in solved),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    # Problems first: where the summary is, the curriculum is finished.
    summary.save({summary.path.with_name(KEPT_FILE): text})


def _load(summary: Store) -> Curriculum:
    path = summary.path.with_name(KEPT_FILE)
    fix = f"delete curriculum.* in {path.parent}"
    try:
        text = path.read_bytes()
        problems = [Problem(**json.loads(line)) for line in text.decode().split("\n") if line]
        names = {field.name for field in fields(Curriculum)} - {"problems"}
        figures = {name: summary.content[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RlkvError(f"{summary.path}: no finished curriculum ({error!r}): {fix}") from error
    if hashlib.sha256(text).hexdigest() != figures["sha256"]:
        raise RlkvError(f"{path}: was changed after it was made: {fix} to make it again")
    return Curriculum(problems, **figures)
