"""``rlkv score``: make a head profile for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlkv_vllm.profile import HeadProfile


def score(
    model: Annotated[
        str, typer.Argument(help="`embedded`, a model folder, or org/name on the hub.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")],
    method: Annotated[str, typer.Option(help="The scorer.")] = "head-importance",
    task: Annotated[str, typer.Option(help="Where the problems come from.")] = "embedded",
    n: Annotated[int, typer.Option("--n", help="Problems that the model answers itself.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the problems; the evaluation has the next.")] = 0,
    sink: Annotated[
        int | None,
        typer.Option(help="First tokens a streaming head sees. Default: 16, embedded model 4."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Last tokens a streaming head sees. Default: 64, embedded model 16."),
    ] = None,
    evaluate: Annotated[
        int, typer.Option(help="Fresh problems to evaluate the gates on; 0: no evaluation.")
    ] = 0,
    sparsities: Annotated[
        str, typer.Option(help="Where to evaluate, separated by commas.")
    ] = "0,.2,.4,.5,.6,.8,1",
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut off.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Problems decoded together.")] = 64,
    revision: Annotated[
        str | None, typer.Option(help="Commit, branch or tag of a model on the hub.")
    ] = None,
) -> None:
    """Score every KV head of MODEL by how much it needs its whole cache.

    The model answers problems; the scorer works on its correct answers.
    """
    shares = _sparsities(sparsities)
    _refuse_folder(output)

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
        batch_size=batch_size,
        revision=revision,
    )
    with _Progress() as progress:
        profile = make_profile(config, progress.report)
    save_profile(profile, output)
    _print(profile, output)


def _sparsities(text: str) -> tuple[float, ...]:
    from rlkv_vllm.allocation.heads import check_sparsity
    from rlkv_vllm.errors import RlkvError

    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RlkvError(
            f"--sparsities {text}: must be numbers in [0, 1] separated by commas, e.g. 0,.4,.5"
        ) from error
    for share in shares:
        check_sparsity(share)
    return shares


def _refuse_folder(output: Path) -> None:
    from rlkv_vllm.errors import RlkvError

    if output.is_dir():
        raise RlkvError(f"--output {output}: is a folder: name a file in it, e.g. profile.json")


class _Progress:
    """A bar per stage on a terminal, a line per finished stage elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._is_plain = not console.is_terminal
        self._stages: dict[str, int] = {}

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def report(self, stage: str, done: int, total: int) -> None:
        if self._is_plain:
            if done == total:
                typer.echo(f"{stage}: {done}", err=True)
            return
        if stage not in self._stages:
            self._stages[stage] = int(self._bars.add_task(stage, total=total))
        self._bars.update(self._bars.task_ids[self._stages[stage]], completed=done)


def _print(profile: HeadProfile, output: Path) -> None:
    rows = profile.evaluation
    if rows:
        typer.echo("sparsity  accuracy  output tokens")
        for row in rows:
            typer.echo(f"{row.sparsity:>8g}  {row.accuracy:>8.3f}  {row.mean_output_tokens:>13.1f}")
    if rows:
        best = profile.recommended_sparsity
        typer.echo(f"recommended sparsity: {'none' if best is None else f'{best:g}'}")
    typer.echo(f"wrote {output}: {profile.provenance.data}")
