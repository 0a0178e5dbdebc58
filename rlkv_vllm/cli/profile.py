"""`rlkv profile`: show, check, convert and plan with head profiles."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlkv_vllm.cli.plan import ClusterFlags, cache_memory, find_gpu, print_cluster
from rlkv_vllm.cli.sizes import parse_size, show_size
from rlkv_vllm.cli.tables import new_table, print_next, print_plain
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlkv_vllm.allocation import Forecast
    from rlkv_vllm.profile.schema import HeadProfile

app = typer.Typer(no_args_is_help=True, help="Head profiles: list, show, check, convert, plan.")

_PROFILE_HELP = "A file, a packaged name, or org/repo@revision on the Hugging Face hub."
_MODEL_HELP = "Model folder, org/name on the Hugging Face hub, or `embedded`."

ProfileName = Annotated[str, typer.Argument(metavar="PROFILE", help=_PROFILE_HELP)]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of streaming heads, 0 to 1 (default: the profile's)."),
]
MaxLoss = Annotated[
    str | None,
    typer.Option(
        metavar="L", help="Accuracy that may be lost, e.g. 1% or 0.01: it chooses the sparsity."
    ),
]
TensorParallel = Annotated[int, typer.Option(help="Tensor-parallel ranks.")]


class ExportFormat(StrEnum):
    """Formats that a profile can be written in."""

    duo_attention = "duo-attention"


class Dtype(StrEnum):
    """Cache types, named as by vLLM's --dtype and --kv-cache-dtype."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    half = "half"
    float32 = "float32"
    float = "float"
    fp8 = "fp8"

    @property
    def num_bytes(self) -> int:
        """Bytes per element. vLLM's auto is 2 bytes: it serves float32 models in bfloat16."""
        return {"float32": 4, "float": 4, "fp8": 1}.get(self.value, 2)


@app.command("list")
def list_() -> None:
    """List the packaged profiles."""
    from rlkv_vllm.cli.evidence import Evidence
    from rlkv_vllm.profile.budget import MAX_LOSS, percent
    from rlkv_vllm.profile.io import load_profile
    from rlkv_vllm.profile.lookup import packaged_folders, packaged_profiles

    found = packaged_profiles()
    if not found:
        print_plain(f"no packaged profiles in {' or '.join(map(str, packaged_folders()))}")
        return
    columns = (
        "name",
        "model",
        "layers x KV heads",
        "method",
        "sparsity",
        f"within {percent(MAX_LOSS)}",
    )
    table = new_table(*columns)
    for name, path in found.items():
        profile = load_profile(path)
        model, sparsity = profile.model, profile.recommended_sparsity
        shape = f"{model.num_layers} x {model.num_kv_heads}"
        shown = "-" if sparsity is None else f"{sparsity:g}"
        within = Evidence.read(profile).short()
        table.add_row(name, model.id, shape, profile.provenance.method, shown, within)
    print_plain(table)
    print_next("profile", "show", next(iter(found)))


@app.command()
def show(
    profile: ProfileName,
    sparsity: Sparsity = None,
    max_loss: MaxLoss = None,
    tp: TensorParallel = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a profile: model, sink and window, provenance, evaluation, full heads per layer."""
    from rlkv_vllm.allocation import allocate
    from rlkv_vllm.cli.evidence import Evidence
    from rlkv_vllm.profile.budget import asked_budget
    from rlkv_vllm.profile.lookup import find_profile

    budget = asked_budget(max_loss, None, sparsity)
    loaded, path = find_profile(profile)
    evidence = Evidence.read(loaded, budget, tp)
    best = evidence.proven or evidence.measured
    if sparsity is None:
        sparsity = best.sparsity if budget and best else loaded.recommended_sparsity
    allocation = None if sparsity is None else allocate(loaded.gates, sparsity, tp)
    if as_json:
        import json

        content = {
            "file": str(path),
            "sha256": loaded.sha256(),
            "profile": loaded.model_dump(mode="json"),
            "sparsity": sparsity,
            "full_heads": None if allocation is None else allocation.full,
            "accuracy_budget": evidence.content(),
        }
        typer.echo(json.dumps(content, indent=2))
        return
    model, provenance = loaded.model, loaded.provenance
    facts = new_table("", "")
    facts.show_header = False
    for name, value in {
        "file": path,
        "sha256": loaded.sha256(),
        "model": f"{model.id}{f' @ {model.revision}' if model.revision else ''}",
        "architecture": f"{model.model_type}: {model.num_layers} layers, {model.num_query_heads} "
        f"query heads, {model.num_kv_heads} KV heads of {model.head_dim}",
        "sink / window": f"{loaded.sink} / {loaded.window} tokens",
        **{k: getattr(provenance, k) for k in ("method", "source", "created", "data", "seed")},
        "versions": ", ".join(f"{k} {v}" for k, v in provenance.versions.items()),
        "recommended sparsity": loaded.recommended_sparsity,
    }.items():
        facts.add_row(name, "-" if value is None or value == "" else str(value))
    print_plain(facts)
    if loaded.evaluation:
        print_plain(evidence.table())
        print_plain(evidence.sentence())
    if allocation is None:
        print_plain("no recommended sparsity: pass --sparsity to see the full heads")
        print_next("profile", "show", profile, "--sparsity", "0.5")
        return
    heads = new_table("layer", "full heads", f"ids at sparsity {sparsity:g}")
    for layer, ids in enumerate(allocation.full):
        heads.add_row(str(layer), str(len(ids)), " ".join(map(str, ids)) or "-")
    print_plain(heads)
    print_plain(f"{allocation.num_full} full heads, {allocation.num_streaming} streaming heads")
    more = ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    if budget and best:
        more = [*best.budget.flags(), *more]
    _print_serve(profile, loaded, None, None if budget and best else sparsity, more)


@app.command()
def validate(
    profile: ProfileName,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
) -> None:
    """Check a profile, and with --model that it fits that model."""
    from rlkv_vllm.cli.evidence import Evidence
    from rlkv_vllm.models import load_model_fingerprint
    from rlkv_vllm.profile.io import check_matches, is_made_for
    from rlkv_vllm.profile.lookup import find_profile

    loaded, path = find_profile(profile)
    if model is None:
        print_plain(f"{path}: valid")
    else:
        fingerprint = load_model_fingerprint(model)
        check_matches(loaded, fingerprint)
        is_its_own = is_made_for(loaded, fingerprint)
        print_plain(f"{path}: valid, {'' if is_its_own else 'its shape '}fits {model}")
        if not is_its_own:
            print_plain(
                f"warning: it was made for {loaded.model.id}, not for {fingerprint.id}: serve it "
                "only if one is a copy or a fine-tuned version of the other"
            )
    if contradiction := Evidence.read(loaded).contradiction:
        print_plain(f"warning: {contradiction}")
    _print_serve(profile, loaded, model)


@app.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR_OR_TSV",
            help="RLKV adapter_weights.tsv, DuoAttention full_attention_heads.tsv, or a folder "
            "with one of them.",
        ),
    ],
    model: Annotated[str, typer.Option(help=f"The model the gates belong to. {_MODEL_HELP}")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Profile to write (JSON).")],
    sink: Annotated[
        int | None,
        typer.Option(
            help="First tokens that streaming heads keep (default: 16; DuoAttention: config.json)."
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Last tokens that streaming heads keep (default: 64; DuoAttention: config.json)."
        ),
    ] = None,
) -> None:
    """Make a profile from the files that RLKV or DuoAttention publish."""
    from rlkv_vllm.models import load_model_fingerprint
    from rlkv_vllm.profile.io import save_profile
    from rlkv_vllm.profile.published import import_published

    imported = import_published(path, load_model_fingerprint(model), sink=sink, window=window)
    save_profile(imported, output)
    print_plain(
        f"{output}: {imported.provenance.method} gates of {imported.model.num_layers} layers x "
        f"{imported.model.num_kv_heads} KV heads, sink {imported.sink}, window "
        f"{imported.window}; {imported.provenance.config['clipped_gates']} gates clipped to [0, 1]"
    )
    _print_serve(str(output), imported, model)


@app.command()
def export(
    profile: ProfileName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    format_: Annotated[
        ExportFormat, typer.Option("--format", help="Format to write.")
    ] = ExportFormat.duo_attention,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Write 1 for full and 0 for streaming heads at this sparsity (default: the gates)."
        ),
    ] = None,
) -> None:
    """Write a profile as DuoAttention's full_attention_heads.tsv and config.json."""
    from rlkv_vllm.models import model_of
    from rlkv_vllm.profile.lookup import find_profile
    from rlkv_vllm.profile.published import DUO_CONFIG, DUO_FILE, export_duo_attention

    loaded, _ = find_profile(profile)
    export_duo_attention(loaded, output, sparsity)
    print_plain(f"{output}: {DUO_FILE} and {DUO_CONFIG} ({format_.value})")
    model = model_of(loaded)
    print_next("profile", "import", str(output), "--model", model, "-o", "again.json")


@app.command()
def plot(
    profile: ProfileName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture: .png, .svg or .pdf.")],
    sparsity: Sparsity = None,
) -> None:
    """Draw the gates as a heat map and mark the full heads."""
    from rlkv_vllm.profile.choice import choose_profile
    from rlkv_vllm.profile.plot import plot_profile

    choice = choose_profile(profile, sparsity)
    plot_profile(choice.profile, choice.sparsity, output)
    print_plain(f"{output}: written")
    _print_serve(profile, choice.profile, sparsity=sparsity)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    profile: ProfileName,
    max_model_len: Annotated[int, typer.Option(help="Longest request, in tokens.")],
    memory: Annotated[
        str | None,
        typer.Option(
            help="Cache memory of each rank, e.g. 8GiB or 512MiB (default: what --gpu leaves)."
        ),
    ] = None,
    sparsity: Sparsity = None,
    max_loss: MaxLoss = None,
    evidence: Annotated[
        str | None,
        typer.Option(
            metavar="E",
            help="With --max-loss: proven, by a 95% bound, or measured (default: proven).",
        ),
    ] = None,
    tp: TensorParallel = 1,
    dtype: Annotated[Dtype, typer.Option(help="Type of the cache.")] = Dtype.auto,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens per block (default: the engine's choice).")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second: size a cluster for them.")
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(help="Lengths of the prompts: N, LEAST-MOST, or MEDIAN~P95 (log-normal)."),
    ] = None,
    output_tokens: Annotated[
        str | None, typer.Option(help="Lengths of the outputs, chain of thought included.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A10, L4, L40S, A100-40GB, A100-80GB, H100-80GB, H200, or MEMORY,GB/s,TFLOP/s."
        ),
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(help="Most milliseconds between two tokens of a request (default: no limit)."),
    ] = None,
    load: Annotated[float, typer.Option(help="Share of a replica's capacity to use.")] = 0.8,
    efficiency: Annotated[
        float,
        typer.Option(
            help="Share of the GPU's data sheet (bandwidth, FLOP/s) that kernels achieve."
        ),
    ] = 0.7,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Most requests at once in a replica.")
    ] = 1024,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Also simulate the plan with vLLM's scheduler, without a model."
        ),
    ] = False,
) -> None:
    """Forecast the memory of a split and of a full cache, or the size of a cluster."""
    from rlkv_vllm.models import evaluation_words, fingerprint_from_config, load_model_config
    from rlkv_vllm.planning.roofline import ModelSize
    from rlkv_vllm.profile.budget import asked_budget
    from rlkv_vllm.profile.choice import choose_profile
    from rlkv_vllm.profile.evidence import Target
    from rlkv_vllm.profile.forecast import forecast_profile
    from rlkv_vllm.profile.io import check_matches

    flags = ClusterFlags(
        gpu, rate, prompt_tokens, output_tokens, tpot, load, efficiency, max_num_seqs, simulate
    )
    flags.check()
    if memory is None and rate is None:
        raise RlkvError("--memory: needed, e.g. 8GiB; with --rate and --gpu it is what they leave")
    for flag, value in (("--max-model-len", max_model_len), ("--block-size", block_size)):
        if value is not None and value < 1:
            raise RlkvError(f"{flag} {value}: must be 1 or more tokens")
    kv_cache_dtype = "fp8" if dtype is Dtype.fp8 else None
    choice = choose_profile(
        profile,
        sparsity,
        budget=asked_budget(max_loss, evidence, sparsity),
        target=Target(tp, kv_cache_dtype, evaluation_words(model)),
    )
    config, commit = load_model_config(model)
    check_matches(choice.profile, fingerprint_from_config(config, model, commit))

    def forecast(dtype_bytes: int) -> Forecast:
        return forecast_profile(
            choice.profile,
            choice.sparsity,
            dtype_bytes=dtype_bytes,
            max_model_len=max_model_len,
            block_sizes=(block_size,) if block_size else None,
            tp_size=tp,
        )

    if memory is not None:
        memory_bytes = parse_size("--memory", memory)
    if gpu is not None:
        size = ModelSize.from_config(config, dtype.num_bytes)
        device = find_gpu(gpu, efficiency)
        if memory is None:
            memory_bytes = cache_memory(device, size, tp)
    if choice.within is not None:
        print_plain(f"sparsity {choice.sparsity:g}: {choice.within.describe()}")
    _print_plan(forecast(dtype.num_bytes), choice.sparsity, max_model_len, memory_bytes)
    if gpu is not None:
        forecasts = {num_bytes: forecast(num_bytes) for num_bytes in (dtype.num_bytes, 1)}
        print_cluster(flags, device, size, forecasts, tp, memory_bytes, max_model_len)
    more = ["--max-model-len", str(max_model_len)]
    more += ["--tensor-parallel-size", str(tp)] if tp > 1 else []
    if choice.within is not None:
        more = [*choice.within.budget.flags(), *more]
    _print_serve(profile, choice.profile, model, sparsity, more)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the profile format."""
    from rlkv_vllm.profile.schema import json_schema_text

    typer.echo(json_schema_text(), nl=False)


def _print_serve(
    name: str,
    profile: HeadProfile,
    model: str | None = None,
    sparsity: float | None = None,
    more: Sequence[str] = (),
) -> None:
    """How to serve a profile, as the last line."""
    from rlkv_vllm.models import model_of

    recommended = profile.recommended_sparsity
    if sparsity is None and recommended is None and "--max-loss" not in more:
        sparsity = 0.5
    flags = [] if sparsity in (None, recommended) else ["--sparsity", f"{sparsity:g}"]
    command = ["serve", model or model_of(profile), "--profile", name]
    print_next(*command, *flags, *more)


def _print_plan(forecast: Forecast, sparsity: float, num_tokens: int, memory_bytes: int) -> None:
    allocation, groups = forecast.groups.allocation, forecast.groups
    heads = new_table("rank", "full heads", "streaming heads", "pages per block")
    for rank in forecast.ranks:
        heads.add_row(
            str(rank),
            str(allocation.num_full_on(rank)),
            str(allocation.num_streaming_on(rank)),
            str(groups.pages_per_block(rank)),
        )
    print_plain(heads)
    geometry = forecast.geometry
    print_plain(
        f"sparsity {sparsity:g} ({allocation.sparsity:.4f} after rounding), sink {geometry.sink}, "
        f"window {geometry.window}, block size {geometry.block_size}, "
        f"{groups.num_ring_groups} ring group(s); padding "
        f"costs {100 * forecast.waste(num_tokens):.1f}% of a request"
    )
    deciding = max(forecast.ranks, key=forecast.block_bytes)
    table = new_table("per rank", "split", "full cache", "split / full")
    need = forecast.bytes_per_request(num_tokens, deciding)
    stock_need = forecast.stock_bytes_per_request(num_tokens)
    at_once = forecast.requests_at_once(num_tokens, memory_bytes)
    stock_at_once = forecast.stock_requests_at_once(num_tokens, memory_bytes)
    token, stock_token = forecast.bytes_per_token(deciding), forecast.stock_bytes_per_token
    blocks = forecast.num_blocks(memory_bytes)
    stock_blocks = forecast.stock_num_blocks(memory_bytes)
    for name, split, stock, show_as in (
        ("one more token", token, stock_token, show_size),
        (f"a request of {num_tokens} tokens", need, stock_need, show_size),
        (f"blocks in {show_size(memory_bytes)}", blocks, stock_blocks, str),
        ("such requests at once", at_once, stock_at_once, str),
    ):
        ratio = f"{split / stock:.3f}" if stock else "-"
        table.add_row(name, show_as(split), show_as(stock), ratio)
    print_plain(table)
