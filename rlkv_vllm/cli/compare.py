"""``rlkv compare``: methods that find heads, side by side on your models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlkv_vllm.cli.progress import StageProgress, Threads, require_packages
from rlkv_vllm.cli.quick import quick_option, say_start
from rlkv_vllm.cli.sampling import MinP, RepetitionPenalty, Temperature, TopK, TopP
from rlkv_vllm.cli.tables import new_table, print_plain
from rlkv_vllm.files import check_writable

_DEFAULT_METHODS = "greedy,self-distill,random"


def compare(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models: `embedded`, a folder, or org/name on the hub; LABEL=MODEL names one in "
            "the report (default: embedded)."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, separated by commas: scorers of `rlkv score`, and NAME+refine for "
            "`rlkv refine` from the profile of the method NAME. LABEL=SCORER gives another name, "
            f"for two settings of one scorer (default: {_DEFAULT_METHODS}; none with --profile)."
        ),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="LABEL=PATTERN: compare profiles that exist. {model} and {seed} in the pattern "
            "stand for the label of the model and the seed. Repeatable."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The method that the others are tested against (default: the first)."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the methods, separated by commas.")] = (
        "0,1,2"
    ),
    sparsities: Annotated[
        str, typer.Option(help="Where to compare, separated by commas.")
    ] = ".4,.5",
    task: Annotated[str, typer.Option(help="Where the problems come from.")] = "embedded",
    n: Annotated[
        int, typer.Option("--n", min=1, help="Fresh problems, the same for all methods.")
    ] = 1000,
    problem_seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the fresh problems.")
    ] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="Answers per fresh problem.")] = 1,
    score_n: Annotated[
        int, typer.Option(min=1, help="Problems that scorers work on, as `rlkv score --n`.")
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut off.")] = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    sink: Annotated[
        int | None,
        typer.Option(
            min=0, help="First tokens that streaming heads keep (default: the profiles')."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Last tokens that streaming heads keep (default: the profiles')."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 64,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="LABEL.key=value: a setting of a method, e.g. self-distill.steps=200 or "
            "greedy+refine.search.problems=64.",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the comparison; the same command continues it."
        ),
    ] = Path("runs/compare"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all answers again.")] = False,
    threads: Threads = None,
    quick: Annotated[
        bool,
        quick_option(
            methods="head-importance,random",
            seeds="0",
            sparsities=".4",
            n=40,
            score_n=16,
            output="runs/compare-quick",
        ),
    ] = False,
) -> None:
    """Compare methods that find heads: make profiles, solve fresh problems, write a report.

    Every method makes a profile per seed; all allocations solve the same fresh problems by mask.
    Writes profiles, compare.json, report.md and report.png to the output folder.
    """
    import shlex
    import sys

    from rlkv_vllm.allocation.heads import read_sparsities

    check_writable("--output", output / "compare.json")
    names = models or ["embedded"]
    say_start(ctx, f"comparing methods on {', '.join(names)}: {n} problems of task {task}")

    from rlkv_vllm.comparison.config import CompareConfig, read_methods, read_models, read_seeds

    patterns = profile or []
    if methods is None:
        methods = "" if patterns else _DEFAULT_METHODS
    chosen = read_methods(methods, patterns, changes or [])
    if any(method.start is not None for method in chosen.values()):
        require_packages("rlkv compare with +refine", "accelerate")
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    config = CompareConfig(
        models=read_models(names),
        methods=chosen,
        reference=reference or next(iter(chosen)),
        output=output,
        seeds=read_seeds(seeds),
        sparsities=read_sparsities(sparsities, "--sparsities"),
        task=task,
        n=n,
        problem_seed=problem_seed,
        samples=samples,
        sampling={name: value for name, value in given.items() if value is not None},
        max_new_tokens=max_new_tokens,
        score_n=score_n,
        batch_size=batch_size,
        sink=sink,
        window=window,
    )

    from rlkv_vllm.comparison.run import run

    with StageProgress(threads) as progress:
        written, rows = run(
            config,
            command=shlex.join(["rlkv", *sys.argv[1:]]),
            fresh=fresh,
            report=progress.report,
            say=progress.say,
        )
    versus = f"{config.reference} - method"
    table = new_table(
        "model", "sparsity", "method", "accuracy", "tokens", "at cap", "CPU s", versus
    )
    for row in rows:
        table.add_row(*row)
    print_plain(table)
    for path in written:
        typer.echo(f"wrote {path}")
