"""``rlkv bench``: the split cache beside stock vLLM, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rlkv_vllm.cli.quick import quick_option, say_start
from rlkv_vllm.cli.tables import new_table, print_next, print_plain
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import check_writable


def bench(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, Hub id, `embedded`, or random:LAYERSxKV_HEADSxHEAD_DIM for a model "
            "of that size with random weights, e.g. random:28x8x128."
        ),
    ] = "embedded",
    profile: Annotated[
        str | None,
        typer.Option(
            help="Head profile: path, packaged name or Hub repository "
            "(default: that of the embedded model; random gates for random models)."
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of streaming heads, 0 to 1 (default: the profile's; 0.5 for random models)."
        ),
    ] = None,
    suite: Annotated[
        Literal["quick", "full"],
        typer.Option(help="quick: some minutes; full: all batches and contexts."),
    ] = "quick",
    cases: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of solve, capacity, decode, short, prefill, prefix, overhead, "
            "serve, monitoring, startup, rollouts (default: all)."
        ),
    ] = "",
    memory: Annotated[
        str | None,
        typer.Option(
            help="KV cache of every engine, e.g. 8GiB (default: 2GiB; 64MiB for the embedded "
            "model)."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=512, help="Longest request, in tokens (default: 8448; 33024 with --suite full)."
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 128,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of each engine (default: 3; 5 with --suite full)."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of a turn of the case `capacity`.")
    ] = 10.0,
    task: Annotated[
        str,
        typer.Option(
            help="Problems of the cases `solve` and `rollouts`: a task or a .jsonl file. `solve` "
            "gives those of `embedded` to the embedded reasoner, whatever MODEL is."
        ),
    ] = "embedded",
    sink: Annotated[
        int | None,
        typer.Option(help="First tokens that streaming heads keep (default: the profile's)."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Last tokens that streaming heads keep (default: the profile's)."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... (default: vLLM's choice).")
    ] = None,
    eager: Annotated[
        bool | None,
        typer.Option(help="Without compilation and graphs (default: on a CPU)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a CPU engine (default: all cores).")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Name of the report without suffix (default: rlkv-bench/DATE-DEVICE). NAME.json, "
            ".md and .png are written; an interrupted run continues from the .json.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    quick: Annotated[bool, quick_option(cases="capacity,decode", seconds=5.0)] = False,
) -> None:
    """Compare the split cache with stock vLLM on this machine: memory, speed and quality."""
    import os
    import shlex
    import sys
    from datetime import date

    place = output or Path("rlkv-bench/report")
    if not place.name:
        raise RlkvError(f"--output {place}: is no name for a report: give one, e.g. reports/mine")
    check_writable("--output", *(Path(f"{place}{end}") for end in (".json", ".md", ".png")))
    if quick and model == "embedded" and threads is None:
        threads = 1  # this small model: on a busy machine threads wait for each other
    shown = "all cores" if threads is None else f"CPU threads: {threads}"
    say_start(ctx, f"comparing the split cache with stock vLLM on {model}, {shown}")

    from rlkv_vllm.bench.engine import has_cuda
    from rlkv_vllm.bench.run import run
    from rlkv_vllm.bench.target import Options
    from rlkv_vllm.cli.sizes import parse_size

    is_cuda, is_full = has_cuda(), suite == "full"
    options = Options(
        model=model,
        profile=profile,
        sparsity=sparsity,
        sink=sink,
        window=window,
        memory_bytes=None if memory is None else parse_size("--memory", memory),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        dtype=dtype,
        eager=eager,
        threads=threads or len(os.sched_getaffinity(0)),
        full=is_full,
        task=task,
        turn_seconds=seconds,
        is_cuda=is_cuda,
    )
    # Longer turns do not continue a quick run.
    name = f"{date.today().isoformat()}-{'cuda' if is_cuda else 'cpu'}{'-quick' * quick}"
    written, rows = run(
        options,
        [name.strip() for name in cases.split(",") if name.strip()],
        rounds=rounds or (5 if is_full else 3),
        stem=output or Path("rlkv-bench") / name,
        fresh=fresh,
        command=shlex.join(["rlkv", *sys.argv[1:]]),
        say=lambda text: typer.echo(text, err=True),
    )
    table = new_table("case", "point", "figure", "baseline", "compared", "ratio", "roofline")
    for row in rows:
        table.add_row(*row)
    print_plain(table)
    for path in written:
        typer.echo(f"wrote {path}")
    if model.startswith("random:"):
        print_next("eval", "--quick")
        return
    given = {"--profile": profile, "--sparsity": sparsity, "--sink": sink, "--window": window}
    flags = [word for flag, v in given.items() if v is not None for word in (flag, f"{v}")]
    print_next("serve", model, *flags)
