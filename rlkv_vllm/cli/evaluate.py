"""``rlkv eval``: accuracy against sparsity, through the served engine or by mask."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlkv_vllm.cli.progress import StageProgress
from rlkv_vllm.cli.quick import quick_option, say_start
from rlkv_vllm.cli.sampling import MinP, RepetitionPenalty, Temperature, TopK, TopP
from rlkv_vllm.cli.tables import print_next
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import check_writable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlkv_vllm.evaluation.splits import Ask, Split


class By(StrEnum):
    """What writes the answers."""

    ENGINE = "engine"
    MASK = "mask"


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
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help="Problems, the same for all rows (default: 200, with --max-loss what it needs).",
        ),
    ] = None,
    max_loss: Annotated[
        str | None,
        typer.Option(
            help="Accuracy that may be lost, such as 2%: a sparsity is measured until it is proven "
            "to lose no more, or to lose more."
        ),
    ] = None,
    by: Annotated[
        By, typer.Option(help="Through the served engine, or by mask in transformers, without it.")
    ] = By.ENGINE,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            min=1,
            help="Ranks, which share the full heads evenly; by mask as if there were so many.",
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the problems and of the sampling.")
    ] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length cap of an answer.")] = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per problem.")] = 1,
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
    batch_size: Annotated[int, typer.Option(min=1, help="Answers written together, by mask.")] = 64,
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
    """Measure accuracy, answer length and time at several sparsities, with a really split cache.

    With --max-loss each sparsity is measured until it is decided whether it loses more.
    """
    for flag, path in (*(("--output", path) for path in output or []), ("--plot", plot)):
        if path is not None:
            _require_folder(flag, path)
    asked = f"{n} problems" if n else "200 problems" if max_loss is None else "problems"
    budget = "" if max_loss is None else f", within a loss of {max_loss}"
    say_start(
        ctx, f"evaluating {model or 'embedded'}: {asked} of task {task} at each sparsity{budget}"
    )

    from rlkv_vllm.allocation.heads import read_sparsities
    from rlkv_vllm.cli.evaluation import Teller, print_rows
    from rlkv_vllm.cli.sizes import parse_size
    from rlkv_vllm.evaluation import looks, sweep
    from rlkv_vllm.evaluation.conclusion import announce, conclude, is_undecided
    from rlkv_vllm.evaluation.record import Record, output_format
    from rlkv_vllm.evaluation.rows import evaluation_row, recommended_sparsity, with_rows
    from rlkv_vllm.evaluation.splits import find_candidates, plan
    from rlkv_vllm.models import (
        MODEL_NAME,
        choose_sampling,
        load_model_fingerprint,
        model_source,
        serving_defaults,
    )
    from rlkv_vllm.profile.budget import MAX_LOSS, Verdict, largest_within, parse_loss, percent
    from rlkv_vllm.profile.io import check_matches
    from rlkv_vllm.tasks import count_problems, get_task, skip_note

    # All options are checked before an engine starts.
    shares = read_sparsities(sparsity, "--sparsity")
    may_lose = None if max_loss is None else parse_loss("--max-loss", max_loss)
    outputs = output or []
    for path in outputs:
        output_format(path)
    if plot is not None:
        from rlkv_vllm.profile.plot import plot_format

        plot_format(plot)
    model = model or MODEL_NAME
    if model != MODEL_NAME and not profile:
        raise RlkvError(
            f"--profile: needed for model {model}: give the profiles to evaluate, `rlkv score` "
            "and `rlkv train` make them"
        )
    _check_way(ctx, by)
    given = {"dtype": dtype, "max_model_len": max_model_len, "kv_cache_dtype": kv_cache_dtype}
    options: dict[str, Any] = {"kv_cache_memory_bytes": parse_size("--memory", memory)}
    if model == MODEL_NAME:
        options |= {key: serving_defaults(model)[key] for key in ("dtype", "enforce_eager")}
    options |= {key: value for key, value in given.items() if value is not None}
    candidates = find_candidates(profile or [MODEL_NAME], sink, window)
    splits = plan(candidates, shares, tensor_parallel_size)
    source = model_source(model)
    fingerprint = load_model_fingerprint(model)
    for choice in candidates.values():
        check_matches(choice.profile, fingerprint)
        if write_rows:
            sweep.check_can_take_rows(choice)
    sampling, why = choose_sampling(
        model,
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        },
        max_tokens=max_tokens,
        seed=seed,
        samples=samples,
    )
    each = f", {samples} answers per problem" if samples > 1 else ""
    typer.echo(f"sampling: {sampling.describe()}{each} ({why})", err=True)
    columns = {"prompt_column": prompt_column, "answer_column": answer_column}
    chosen = get_task(task, split=split, reward=reward, **columns)
    if note := skip_note(chosen):
        typer.echo(note, err=True)
    wanted = n or (200 if may_lose is None else looks.planned_problems(may_lose))
    held = None if may_lose is None else count_problems(chosen)
    problems = chosen.problems(wanted if held is None else min(wanted, held), seed)
    schedule = looks.schedule(len(problems), may_lose)
    if may_lose is not None:
        for line in announce(schedule, wanted):
            typer.echo(line, err=True)
    changing = {
        **given,
        "dtype": options.get("dtype"),
        "reward": reward,
        "samples": samples,
        "tensor_parallel_size": tensor_parallel_size,
        **sweep.settings_of_looks(schedule, by),
    }
    settings: dict[str, Any] = {}
    if outputs:  # takes the digest of the weights
        settings = sweep.settings_of(
            fingerprint, source, chosen.name, problems, seed, sampling, changing
        )
    record = Record(outputs, settings, fresh=fresh)

    title = f"{fingerprint.id}, task {chosen.name}: {len(problems)} problems, seed {seed}, "
    title += sampling.describe() + each
    if tensor_parallel_size > 1:
        title += f", {tensor_parallel_size} ranks"
    teller = Teller(len(splits), schedule, max_tokens)
    make_row = partial(
        evaluation_row,
        chosen.name,
        seed=seed,
        sampling=sampling,
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
    )
    with ExitStack() as stack:
        if by is By.MASK:
            from rlkv_vllm.evaluation import by_mask
            from rlkv_vllm.hf.loading import load_model

            loaded = load_model(model, dtype=options.get("dtype", "auto"))[:2]
            progress = stack.enter_context(StageProgress())
            opened = partial(by_mask.opened, loaded, batch_size=batch_size, report=progress.report)
        else:
            from rlkv_vllm.evaluation import served
            from rlkv_vllm.serving.progress import quiet_logging

            quiet_logging([])
            opened = partial(served.opened, source, engine_options=options)

        def open_split(one: Split) -> AbstractContextManager[Ask]:
            return opened(one, chosen, problems, sampling, samples)

        try:
            sweep.run(splits, open_split, record, schedule, make_row, teller)
        finally:
            if teller.rows:
                print_rows(title, teller.rows, may_lose or MAX_LOSS)
    for path in outputs:
        typer.echo(f"wrote {path}")
    found = sweep.profile_rows(teller.rows, candidates)
    evaluations = {label: [row.evaluation for row in rows] for label, rows in found.items()}
    if plot is not None:
        from rlkv_vllm.evaluation.plot import accuracy_figure
        from rlkv_vllm.profile.plot import save_figure

        save_figure(accuracy_figure(evaluations, title), plot)
        typer.echo(f"wrote {plot}")
    if write_rows:
        sweep.write_rows(candidates, found)
        for choice in candidates.values():
            typer.echo(f"wrote rows into {choice.path}")
    for label, rows in found.items():
        typer.echo(conclude(label, [row.assessment for row in rows], may_lose or MAX_LOSS))
    label, choice = next(iter(candidates.items()))
    proven = largest_within([row.assessment for row in found[label]], Verdict.PROVEN)
    best = recommended_sparsity(with_rows(choice.profile, evaluations[label]))
    ranks = ["--tensor-parallel-size", str(tensor_parallel_size)] * (tensor_parallel_size > 1)
    if max_loss is not None and proven:
        if not write_rows:
            typer.echo(
                f"{choice.name} does not hold these rows: give --write-rows, and --output to "
                "measure nothing again"
            )
        print_next("serve", model, "--profile", choice.name, "--max-loss", max_loss, *ranks)
    elif best:
        flags = ["--sparsity", f"{best:g}", *(["--task", task] if task != MODEL_NAME else [])]
        print_next("bench", model, "--profile", choice.name, *flags, "--quick" * quick)
    elif is_undecided([row.assessment for row in found[label]]) and (n or max_loss is None):
        words = ["--task", task] if task != MODEL_NAME else []
        words += ["--by", by] if by is By.MASK else []
        words += ["--max-loss", max_loss or percent(MAX_LOSS), *ranks]
        print_next("eval", model, "--profile", choice.name, *words)
    else:  # another ranking of the heads may keep the accuracy
        folder = ["--output", "runs/refined"]
        print_next("refine", choice.name, "--model", model, "--task", task, *folder)


def _check_way(ctx: typer.Context, by: By) -> None:
    """Refuse options that mean nothing to the other way of answering."""
    others = {
        By.MASK: ("memory", "max_model_len", "kv_cache_dtype"),
        By.ENGINE: ("batch_size",),
    }
    for name in others[by]:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            other = next(way for way in By if way is not by)
            raise RlkvError(f"{flag}: has no meaning by {by}: leave it out, or give --by {other}")


def _require_folder(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise RlkvError(f"{flag} {path}: there is no folder {path.parent}: make it first")
    check_writable(flag, path)
