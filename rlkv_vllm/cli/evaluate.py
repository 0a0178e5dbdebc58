"""``rlkv eval``: accuracy against sparsity, through the served engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkv_vllm.cli.quick import quick_option, say_start
from rlkv_vllm.cli.tables import new_table, print_next, print_plain
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlkv_vllm.evaluation.record import Row
    from rlkv_vllm.evaluation.splits import Split
    from rlkv_vllm.tasks.measurement import Measurement

_NOTE = (
    "s/solved: seconds of the whole run per solved problem, all problems in flight together; a "
    "throughput\nof this machine, the engine's start not counted. p: exact McNemar test against "
    "the full cache."
)

_COLUMNS = ("sparsity", "accuracy", "95% interval", "mean tokens", "p95", "at cap", "s/solved", "p")


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id (default: the embedded model).")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="Head profile: path, packaged name or Hub repository; LABEL=P names it in the "
            "table. Repeat it to compare (default: the embedded model's)."
        ),
    ] = None,
    sparsity: Annotated[
        str,
        typer.Option(
            help="Comma-separated shares of streaming heads. The full cache (0) and all streaming "
            "heads (1, StreamingLLM) are always measured."
        ),
    ] = "0,.2,.4,.5,.6,.8",
    task: Annotated[
        str, typer.Option(help="Where the problems come from: a task name or a .jsonl file.")
    ] = "embedded",
    prompt_column: Annotated[
        str, typer.Option(help="Column of the questions, in a file or data set.")
    ] = "prompt",
    answer_column: Annotated[
        str, typer.Option(help="Column of the answers, in a file or data set.")
    ] = "answer",
    split: Annotated[str, typer.Option(help="Which part of a data set.")] = "train",
    reward: Annotated[
        str | None, typer.Option(help="Score answers with this function, `package.module:name`.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Problems, the same for all rows.")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the problems and of the sampling.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length cap of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability kept.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Tokens kept, 0 for all.")] = 0,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest request in tokens (default: the model's).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... (default: vLLM's choice).")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="auto, fp8, fp8_e5m2 (default: the model's).")
    ] = None,
    sink: Annotated[
        int | None, typer.Option(min=0, help="First tokens kept (default: the profiles').")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Last tokens kept (default: the profiles').")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memory of the KV cache, such as 512MiB or 8GiB.")
    ] = "512MiB",
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the rows to this .json or .csv file as they are finished; may be repeated. "
            "An interrupted run continues from the .json file.",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure all rows again, overwrite --output.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Plot accuracy and length to this .png, .svg or .pdf.")
    ] = None,
    write_rows: Annotated[
        bool, typer.Option("--write-rows", help="Put the rows into the profile files.")
    ] = False,
    quick: Annotated[bool, quick_option(n=40, sparsity=".4")] = False,
) -> None:
    """Measure accuracy, answer length and time at several sparsities, with a really split cache."""
    for flag, path in (*(("--output", path) for path in output or []), ("--plot", plot)):
        if path is not None:
            _require_folder(flag, path)
    say_start(
        ctx, f"evaluating {model or 'embedded'}: {n} problems of task {task} at each sparsity"
    )

    from rlkv_vllm.allocation.heads import read_sparsities
    from rlkv_vllm.answers import Sampling
    from rlkv_vllm.cli.sizes import parse_size
    from rlkv_vllm.evaluation import sweep
    from rlkv_vllm.evaluation.record import Record, output_format
    from rlkv_vllm.evaluation.rows import recommended_sparsity, with_rows
    from rlkv_vllm.evaluation.served import answer
    from rlkv_vllm.evaluation.splits import find_candidates, plan
    from rlkv_vllm.models import MODEL_NAME, load_model_fingerprint, model_source, serving_defaults
    from rlkv_vllm.profile.io import check_matches
    from rlkv_vllm.serving.progress import quiet_logging
    from rlkv_vllm.tasks import get_task, skip_note

    # All options are checked before an engine starts.
    shares = read_sparsities(sparsity, "--sparsity")
    if not 0 < top_p <= 1:
        raise RlkvError(f"--top-p {top_p:g}: must be above 0 and at most 1")
    options: dict[str, Any] = {"kv_cache_memory_bytes": parse_size("--memory", memory)}
    outputs = output or []
    for path in outputs:
        output_format(path)
    if plot is not None:
        from rlkv_vllm.profile.plot import plot_format

        plot_format(plot)
    model = model or MODEL_NAME
    if model == MODEL_NAME:
        options |= {key: serving_defaults(model)[key] for key in ("dtype", "enforce_eager")}
    elif not profile:
        raise RlkvError(
            f"--profile: needed for model {model}: give the profiles to evaluate, `rlkv score` "
            "and `rlkv train` make them"
        )
    given = {"dtype": dtype, "max_model_len": max_model_len, "kv_cache_dtype": kv_cache_dtype}
    options |= {key: value for key, value in given.items() if value is not None}
    candidates = find_candidates(profile or [MODEL_NAME], sink, window)
    splits = plan(candidates, shares)
    source = model_source(model)
    fingerprint = load_model_fingerprint(model)
    for choice in candidates.values():
        check_matches(choice.profile, fingerprint)
        if write_rows:
            sweep.check_can_take_rows(choice)
    columns = {"prompt_column": prompt_column, "answer_column": answer_column}
    chosen = get_task(task, split=split, reward=reward, **columns)
    if note := skip_note(chosen):
        typer.echo(note, err=True)
    problems = chosen.problems(n, seed)
    sampling = Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    changing = {**given, "dtype": options.get("dtype"), "reward": reward}
    settings: dict[str, Any] = {}
    if outputs:  # takes the digest of the weights
        settings = sweep.settings_of(
            fingerprint, source, chosen.name, problems, seed, sampling, changing
        )
    record = Record(outputs, settings, fresh=fresh)

    title = f"{fingerprint.id}, task {chosen.name}: {n} problems, seed {seed}, "
    title += sampling.describe()
    rows: list[Row] = []

    def on_row(row: Row, reused: bool) -> None:
        rows.append(row)
        measured = row.measurement
        how = "already measured" if reused else f"{measured.seconds:.1f} s"
        typer.echo(
            f"[{len(rows)}/{len(splits)}] {row.split.label}, sparsity {row.split.sparsity:g}: "
            f"{measured.solved} of {measured.n} solved, {measured.mean_output_tokens:.0f} tokens "
            f"on average ({how})"
        )

    def serve(one: Split) -> Measurement:
        return answer(source, one, chosen, problems, sampling, options)

    quiet_logging([])
    try:
        sweep.run(splits, serve, record, on_row)
    finally:
        if rows:
            _print_table(title, rows)
    for path in outputs:
        typer.echo(f"wrote {path}")
    found = sweep.profile_rows(rows, candidates, task=chosen.name, seed=seed, sampling=sampling)
    if plot is not None:
        from rlkv_vllm.evaluation.plot import accuracy_figure
        from rlkv_vllm.profile.plot import save_figure

        save_figure(accuracy_figure(found, title), plot)
        typer.echo(f"wrote {plot}")
    if write_rows:
        sweep.write_rows(candidates, found)
        for choice in candidates.values():
            typer.echo(f"wrote rows into {choice.path}")
    label, choice = next(iter(candidates.items()))
    best = recommended_sparsity(with_rows(choice.profile, found[label]))
    if best:
        flags = ["--sparsity", f"{best:g}", *(["--task", task] if task != MODEL_NAME else [])]
        print_next("bench", model, "--profile", choice.name, *flags, "--quick" * quick)
    else:  # another ranking of the heads may keep the accuracy
        folder = ["--output", "runs/refined"]
        print_next("refine", choice.name, "--model", model, "--task", task, *folder)


def _require_folder(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise RlkvError(f"{flag} {path}: there is no folder {path.parent}: make it first")
    check_writable(flag, path)


def _print_table(title: str, rows: Sequence[Row]) -> None:

    table = new_table("profile", *_COLUMNS)
    table.title = title
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        measured = row.measurement
        low, high = measured.interval
        seconds = measured.seconds_per_solved
        table.add_row(
            row.split.label,
            f"{row.split.sparsity:g}",
            f"{measured.accuracy:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{measured.mean_output_tokens:.0f}",
            f"{measured.p95_output_tokens}",
            f"{measured.capped_share:.1%}",
            "-" if seconds is None else f"{seconds:.3g}",
            "-" if row.p_full is None else f"{row.p_full:.2g}",
        )
    print_plain(table)
    typer.echo(_NOTE)
