"""``rlkv bench``: the split cache beside stock vLLM, on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Suite(StrEnum):
    """How much is measured."""

    quick = "quick"
    full = "full"


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, Hub id, `embedded`, or random:LAYERSxKV_HEADSxHEAD_DIM for a model "
            "of that size without weights, such as random:28x8x128."
        ),
    ] = "embedded",
    profile: Annotated[
        str | None,
        typer.Option(help="Head profile: path, packaged name or Hub repository."),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of streaming heads [default: the profile's; random models .5]."),
    ] = None,
    suite: Annotated[
        Suite, typer.Option(help="quick: some minutes; full: all batches and contexts.")
    ] = Suite.quick,
    cases: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of solve, capacity, decode, short, prefill, prefix, overhead, "
            "serve, startup [default: all]."
        ),
    ] = "",
    memory: Annotated[
        str | None,
        typer.Option(
            help="KV cache of every engine, such as 8GiB [default: 2GiB, of the embedded model "
            "64MiB]."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=512, help="Longest request [default: 8,448; with --suite full 33,024]."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests at once.")] = 128,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of each engine [default: 3; full: 5].")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of a turn of the capacity case.")
    ] = 10.0,
    task: Annotated[
        str,
        typer.Option(
            help="Whose problems are solved: `embedded` by the embedded reasoner, a .jsonl file or "
            "another task by MODEL."
        ),
    ] = "embedded",
    sink: Annotated[int | None, typer.Option(min=0, help="Instead of the profile's.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Instead of the profile's.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... [default: vLLM's choice].")
    ] = None,
    eager: Annotated[
        bool | None,
        typer.Option(help="Without compilation and graphs [default: on a CPU]."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of a CPU engine [default: all cores].")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Name of the report without suffix: .json, .md and .png are written, and an "
            "interrupted run goes on from the .json [default: rlkv-bench/DATE-DEVICE].",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
) -> None:
    """How many more users, how much faster, at what quality: measured beside stock vLLM."""
    import os
    import shlex
    import sys
    from datetime import date

    from rlkv_vllm.allocation.heads import check_sparsity
    from rlkv_vllm.bench.run import run
    from rlkv_vllm.bench.session import has_cuda
    from rlkv_vllm.bench.target import Options
    from rlkv_vllm.cli.sizes import parse_size

    if sparsity is not None:
        check_sparsity(sparsity)
    is_cuda, is_full = has_cuda(), suite is Suite.full
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
    device = "cuda" if is_cuda else "cpu"
    written = run(
        options,
        [name.strip() for name in cases.split(",") if name.strip()],
        rounds=rounds or (5 if is_full else 3),
        stem=output or Path("rlkv-bench") / f"{date.today().isoformat()}-{device}",
        fresh=fresh,
        command=shlex.join(["rlkv", *sys.argv[1:]]),
        say=lambda text: typer.echo(text, err=True),
    )
    for path in written:
        typer.echo(f"wrote {path}")
