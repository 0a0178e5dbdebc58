"""`rlkv testbed`: the embedded reasoner and its problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rlkv_vllm.errors import RlkvError

app = typer.Typer(
    help="Train the embedded reasoner, or draw problems for it.", no_args_is_help=True
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
    """Train the embedded reasoner, or one like it, on one core and measure it (20 minutes)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from rlkv_vllm.models import MODEL_NAME
    from rlkv_vllm.tasks.puzzles import FAMILIES, LONG_FAMILIES
    from rlkv_vllm.testbed import train as training

    if family is not None:
        _check_task("--family", family, (*FAMILIES, *LONG_FAMILIES))
    config = training.TrainingConfig.of(
        family, seed=seed, init=init, max_steps=max_steps, checkpoint_steps=checkpoint_steps
    )
    console = Console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        job = bar.add_task("training", total=config.max_steps, state="")

        def report(state: training.TrainingState) -> None:
            text = (
                f"step {state.step} size {state.scale:.2f} "
                f"token accuracy {state.accuracy:.3f} loss {state.loss:.3f}"
            )
            bar.update(job, completed=state.step, total=state.expected_steps(config), state=text)
            if not console.is_terminal and state.step % 50 == 0:
                console.print(text, highlight=False)

        metrics = training.train(config, output, resume=resume, report=report, measure=measure)
    accuracy = metrics["accuracy"][metrics["weights"]]
    task = family or MODEL_NAME
    console.print(
        f"{output}: {metrics['weights']}, solves {accuracy['full'][task]:.1%} of "
        f"{measure} fresh problems, {accuracy['streaming'][task]:.1%} with all heads "
        "streaming",
        highlight=False,
        soft_wrap=True,
    )


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
