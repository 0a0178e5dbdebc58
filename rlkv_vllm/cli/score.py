"""``rlkv score``: make a head profile for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlkv_vllm.cli.progress import StageProgress, print_evaluation
from rlkv_vllm.cli.quick import quick_option, say_start
from rlkv_vllm.cli.sampling import MinP, RepetitionPenalty, TopP
from rlkv_vllm.cli.tables import print_next
from rlkv_vllm.files import check_writable
from rlkv_vllm.scorers import METHODS


def score(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")],
    model: Annotated[
        str, typer.Argument(help="`embedded`, a model folder, or org/name on the hub.")
    ] = "embedded",
    method: Annotated[
        str,
        typer.Option(
            help="The scorer (docs/find-heads.md):\n\n"
            + "\n\n".join(f"{name}: {summary}" for name, summary in METHODS.items())
        ),
    ] = "greedy",
    task: Annotated[str, typer.Option(help="Where the problems come from.")] = "embedded",
    n: Annotated[int, typer.Option("--n", help="Problems that the model answers itself.")] = 128,
    seed: Annotated[
        int, typer.Option(help="Seed of the problems; the evaluation uses the next one.")
    ] = 0,
    sink: Annotated[
        int | None,
        typer.Option(
            help="First tokens that a streaming head sees (default: 16, embedded model 4)."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last tokens that a streaming head sees (default: 64, embedded model 16)."
        ),
    ] = None,
    evaluate: Annotated[
        int, typer.Option(help="Fresh problems to evaluate the gates on; 0: no evaluation.")
    ] = 0,
    sparsities: Annotated[
        str, typer.Option(help="Where to evaluate, separated by commas.")
    ] = "0,.2,.4,.5,.6,.8,1",
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the answers, 0 is greedy (default of all five: generation_config.json)."
        ),
    ] = None,
    top_p: TopP = None,
    top_k: Annotated[int | None, typer.Option(help="Likely tokens to draw from; 0: all.")] = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    samples: Annotated[int, typer.Option(help="Answers per problem.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Answers written together.")] = 64,
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of a model on the hub.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the scorer, e.g. --set until=.8."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew where a killed run left its work.")
    ] = False,
    quick: Annotated[
        bool,
        quick_option(n=16, evaluate=32, sparsities="0,.2,.4,.6,1", output="quick-profile.json"),
    ] = False,
) -> None:
    """Score every KV head of MODEL by how much it needs its full cache.

    The model answers problems; the scorer works on its correct answers. What was computed lies in
    OUTPUT.work.json until the profile is written: the same command continues a killed run.
    """
    from rlkv_vllm.allocation.heads import read_sparsities

    shares = tuple(read_sparsities(sparsities, "--sparsities"))
    check_writable("--output", output)
    say_start(ctx, f"scoring the heads of {model} with {method}: {n} problems of task {task}")

    from rlkv_vllm.options import override
    from rlkv_vllm.profile.io import save_profile
    from rlkv_vllm.scorers.run import ScoreConfig, make_profile

    config = ScoreConfig(
        model=model,
        method=method,
        task=task,
        n=n,
        seed=seed,
        sink=sink,
        window=window,
        evaluate=evaluate,
        sparsities=shares,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        samples=samples,
        batch_size=batch_size,
        revision=revision,
        settings=override({}, overrides or []),
    )
    work = output.with_name(f"{output.name}.work.json")
    with StageProgress() as progress:
        profile = make_profile(config, progress.report, progress.say, work=work, fresh=fresh)
    save_profile(profile, output)
    work.unlink(missing_ok=True)
    print_evaluation(profile)
    typer.echo(f"wrote {output}: {profile.provenance.data}")
    tasks = [] if task == "embedded" else ["--task", task]
    print_next("eval", model, "--profile", str(output), *tasks, "--quick" * quick)
