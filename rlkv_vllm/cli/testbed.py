"""`rlkv testbed`: the embedded reasoner and its problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlkv_vllm.cli.tables import print_next
from rlkv_vllm.errors import RlkvError

app = typer.Typer(
    help="Train the embedded reasoner, or print problems for it.", no_args_is_help=True
)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("runs/testbed"),
    family: Annotated[
        str | None,
        typer.Option(help="Train on this family alone; audit has long chains of thought."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and data.")] = 0,
    init: Annotated[
        str | None,
        typer.Option(help="Start from the weights of this model: `embedded`, or a folder."),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="Stop here at the latest.")] = 6000,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Save the state this often.")] = 200,
    measure: Annotated[int, typer.Option(min=1, help="Problems to measure accuracy with.")] = 300,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
) -> None:
    """Train the embedded reasoner, or one like it, on one core, and measure it."""
    from rlkv_vllm.cli.progress import StageProgress
    from rlkv_vllm.models import MODEL_NAME
    from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES
    from rlkv_vllm.testbed import train as training

    if family is not None:
        _check_task("--family", family, (*FAMILIES, *LONG_FAMILIES))
    config = training.TrainingConfig.of(
        family, seed=seed, init=init, max_steps=max_steps, checkpoint_steps=checkpoint_steps
    )
    with StageProgress() as progress:

        def report(state: training.TrainingState) -> None:
            text = (
                f"size {state.scale:.2f} token accuracy {state.accuracy:.3f} loss {state.loss:.3f}"
            )
            progress.report("training", state.step, state.expected_steps(config), text)

        metrics = training.train(config, output, resume=resume, report=report, measure=measure)
    accuracy = metrics["accuracy"][metrics["weights"]]
    task = family or MODEL_NAME
    typer.echo(
        f"{output}: {metrics['weights']}, solves {accuracy['full'][task]:.1%} of {measure} fresh "
        f"problems, {accuracy['streaming'][task]:.1%} with all heads streaming"
    )
    print_next("score", str(output), "-o", "profile.json")


@app.command()
def sample(
    task: Annotated[
        str, typer.Option(help="chain, hops, program, ledger, embedded: all of these, or audit.")
    ] = "embedded",
    n: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed gives the same problems.")] = 0,
) -> None:
    """Print problems as JSON lines with `prompt` and `answer`."""
    from rlkv_vllm.models import MODEL_NAME
    from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES, make_problems

    _check_task("--task", task, (*FAMILIES, *LONG_FAMILIES, MODEL_NAME))
    for problem in make_problems(None if task == MODEL_NAME else task, n, seed):
        print(json.dumps({"prompt": problem.prompt, "answer": problem.answer}))


def _check_task(flag: str, name: str, allowed: tuple[str, ...]) -> None:
    if name not in allowed:
        raise RlkvError(f"{flag} {name}: unknown, choose one of {', '.join(allowed)}")
