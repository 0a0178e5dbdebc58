"""``rlkv eval``: accuracy against sparsity, through the served engine."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id [default: the embedded model].")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Head profile: path, packaged name or Hub repository.")
    ] = "embedded",
    sparsity: Annotated[
        str, typer.Option(help="Comma-separated sparsities; 0 is the full cache, 1 StreamingLLM.")
    ] = "0,.2,.4,.5,.6,.8,1",
    task: Annotated[
        str, typer.Option(help="Task name, or a .jsonl file with prompt and answer.")
    ] = "embedded",
    n: Annotated[int, typer.Option("--n", min=1, help="Problems.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length cap of an answer.")] = 1024,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest request [default: the model's].")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... [default: vLLM's choice].")
    ] = None,
    sink: Annotated[int | None, typer.Option(min=0, help="Instead of the profile's.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Instead of the profile's.")] = None,
    memory: Annotated[
        str, typer.Option(help="Memory of the KV cache, such as 512MiB or 8GiB.")
    ] = "512MiB",
    output: Annotated[Path | None, typer.Option("-o", help="Write the scores as JSON.")] = None,
) -> None:
    """Solve fresh problems with a really split cache and report accuracy per sparsity."""
    import json

    from pydantic import ByteSize, TypeAdapter, ValidationError
    from rich.console import Console
    from rich.table import Table

    from rlkv_vllm.allocation.heads import check_sparsity
    from rlkv_vllm.errors import RlkvError
    from rlkv_vllm.evaluation.tasks import get_task
    from rlkv_vllm.profile.io import check_matches, load_model_fingerprint, write_text_atomic
    from rlkv_vllm.profile.lookup import find_profile
    from rlkv_vllm.serving.arguments import EMBEDDED_DEFAULTS, WORKER_EXTENSION
    from rlkv_vllm.testbed import MODEL_NAME, model_source

    try:
        sparsities = [float(part) for part in sparsity.split(",")]
    except ValueError:
        raise RlkvError(
            f"--sparsity {sparsity}: give numbers from 0 to 1 separated by commas"
        ) from None
    for share in sparsities:
        check_sparsity(share)
    try:
        memory_bytes = int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError:
        raise RlkvError(f"--memory {memory}: give a size such as 512MiB or 8GiB") from None
    options: dict[str, object] = {
        "kv_cache_memory_bytes": memory_bytes,
        "worker_extension_cls": WORKER_EXTENSION,
    }
    model = model or MODEL_NAME
    if model == MODEL_NAME:
        options |= {key: EMBEDDED_DEFAULTS[key] for key in ("dtype", "enforce_eager")}
    if dtype is not None:
        options["dtype"] = dtype
    model = model_source(model)
    head_profile, path = find_profile(profile)
    check_matches(head_profile, load_model_fingerprint(model))
    problems = get_task(task)

    from rlkv_vllm.evaluation.served import Score, evaluate

    if max_model_len is not None:
        options["max_model_len"] = max_model_len
    console = Console()

    def show(score: Score) -> None:
        console.print(
            f"sparsity {score.sparsity:g}: {score.solved} of {score.n} solved", highlight=False
        )

    scores = evaluate(
        model,
        str(path),
        sparsities,
        problems,
        n=n,
        seed=seed,
        max_tokens=max_tokens,
        sink=sink,
        window=window,
        engine_options=options,
        on_score=show,
    )
    table = Table(title=f"{problems.name}: {n} problems, seed {seed}, greedy")
    for column in ("sparsity", "accuracy", "95% interval", "mean tokens", "p95", "hit the cap"):
        table.add_column(column, justify="right")
    for score in scores:
        low, high = score.interval
        table.add_row(
            f"{score.sparsity:g}",
            f"{score.accuracy:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{score.mean_output_tokens:.0f}",
            f"{score.p95_output_tokens}",
            f"{score.capped}",
        )
    console.print(table)
    if output is not None:
        write_text_atomic(output, json.dumps([s.to_dict() for s in scores], indent=2) + "\n")
