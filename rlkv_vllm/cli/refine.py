"""``rlkv refine``: search for full heads that serve better, around those of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlkv_vllm.cli.progress import Resume, StageProgress, Threads, print_result, require_packages


def refine(
    profile: Annotated[
        str, typer.Argument(help="Head profile to start from: a file, a name, or org/name.")
    ],
    model: Annotated[str, typer.Option(help="`embedded`, a model folder, or org/name on the hub.")],
    task: Annotated[str, typer.Option(help="Where the problems come from (docs/tasks.md).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    sparsities: Annotated[
        str, typer.Option(help="Sparsities that count, separated by commas.")
    ] = ".4,.5",
    problems: Annotated[
        int, typer.Option(help="Problems of the race; as many others test the winner.")
    ] = 256,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the problems; the evaluation has the next.")] = 0,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the other options, e.g. search.margin=20."),
    ] = None,
    resume: Resume = False,
    threads: Threads = None,
) -> None:
    """Search for full heads that serve better, around the ranking of PROFILE.

    Allocations in which two heads have changed places are compared by the problems that the model
    solves with really split heads. Writes profile.json, report.html and all answers to the output
    folder. On several GPUs: accelerate launch -m rlkv_vllm refine PROFILE ...
    """
    from rlkv_vllm.allocation.heads import read_sparsities
    from rlkv_vllm.options import override, validate

    require_packages("rlkv refine", "accelerate")
    from rlkv_vllm.search.config import RefineConfig
    from rlkv_vllm.search.job import run
    from rlkv_vllm.training.run import QUIET, Listener

    content = {
        "profile": profile,
        "model": model,
        "output": str(output),
        "task": {"name": task},
        "seed": seed,
        "sampling": {"max_tokens": max_new_tokens},
        "search": {"sparsities": read_sparsities(sparsities, "--sparsities"), "problems": problems},
    }
    job = validate(
        RefineConfig, override(content, changes or []), "rlkv refine", "docs/find-heads.md"
    )
    with StageProgress(threads) as progress:
        listener = Listener(progress.report, say=progress.say) if progress.is_main else QUIET
        print_result(run(job, resume=resume, listener=listener), job, job.sampling.max_tokens)
