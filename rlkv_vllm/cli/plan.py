"""The part of ``rlkv profile plan`` that sizes a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlkv_vllm.cli.sizes import parse_size, show_size
from rlkv_vllm.cli.tables import new_table, print_plain
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from rlkv_vllm.allocation.forecast import Forecast
    from rlkv_vllm.planning.fleet import Lengths, Replica, Sustained
    from rlkv_vllm.planning.roofline import Device, ModelSize


@dataclass(frozen=True)
class ClusterFlags:
    """Flags of the traffic as given; `rlkv profile plan --help` describes them."""

    gpu: str | None
    rate: float | None
    prompt_tokens: str | None
    output_tokens: str | None
    tpot: float | None
    load: float
    efficiency: float
    max_num_seqs: int
    simulate: bool

    def check(self) -> None:
        """Refuse an incomplete description of the traffic.

        Raises:
            RlkvError: naming what is missing or out of range.
        """
        traffic = {
            "--gpu": self.gpu,
            "--prompt-tokens": self.prompt_tokens,
            "--output-tokens": self.output_tokens,
        }
        if self.rate is None:
            if given := ", ".join(flag for flag, value in traffic.items() if value):
                raise RlkvError(f"{given}: needs --rate, the requests per second")
            return
        if missing := ", ".join(flag for flag, value in traffic.items() if not value):
            raise RlkvError(f"--rate {self.rate:g}: also give {missing}")
        for flag, share in (("--load", self.load), ("--efficiency", self.efficiency)):
            if not 0 < share <= 1:
                raise RlkvError(f"{flag} {share:g}: must be above 0 and at most 1")
        for flag, value in (("--rate", self.rate), ("--tpot", self.tpot)):
            if value is not None and not 0 < value < float("inf"):
                raise RlkvError(f"{flag} {value:g}: must be more than 0")


def find_gpu(text: str, efficiency: float) -> Device:
    """A GPU by name or by figures, scaled to the share that kernels achieve.

    Raises:
        RlkvError: there is no such GPU.
    """
    from rlkv_vllm.planning.fleet import GPUS
    from rlkv_vllm.planning.roofline import Device

    device = next((gpu for name, gpu in GPUS.items() if name.lower() == text.lower()), None)
    if device is None:
        try:
            memory, *speeds = text.split(",")
            gigabytes, teraflops = map(float, speeds)
            if not (0 < gigabytes < 1e6 and 0 < teraflops < 1e6):
                raise ValueError
        except ValueError:
            raise RlkvError(
                f"--gpu {text}: give one of {', '.join(GPUS)}, or MEMORY,GB/s,TFLOP/s such as "
                "80GiB,3350,989"
            ) from None
        device = Device(text, parse_size("--gpu", memory), gigabytes * 1e9, teraflops * 1e12)
    return replace(
        device,
        bytes_per_s=device.bytes_per_s * efficiency,
        flops_per_s=device.flops_per_s * efficiency,
    )


def cache_memory(device: Device, model: ModelSize, tp: int) -> int:
    """KV cache of each rank: vLLM's share of the GPU less weights and working memory (bytes).

    Raises:
        RlkvError: nothing is left.
    """
    from rlkv_vllm.planning.fleet import VLLM_SHARE, WORK_BYTES

    left = int(device.memory_bytes * VLLM_SHARE) - model.resident_bytes // tp - WORK_BYTES
    if left <= 0:
        raise RlkvError(
            f"--gpu {device.name}: {show_size(model.resident_bytes // tp)} of weights per rank "
            f"leave no room for a cache in {show_size(device.memory_bytes)}: more --tp or a larger "
            "GPU"
        )
    return left


def print_cluster(
    flags: ClusterFlags,
    device: Device,
    model: ModelSize,
    forecasts: dict[int, Forecast],
    tp: int,
    memory_bytes: int,
    max_model_len: int,
) -> None:
    """Replicas for the traffic, with each kind of cache."""
    from rlkv_vllm.engine.support import REFUSALS
    from rlkv_vllm.planning.fleet import pair_lengths, read_lengths, replicas_of, sustained

    assert flags.rate
    assert flags.prompt_tokens
    assert flags.output_tokens
    lengths = pair_lengths(
        read_lengths("--prompt-tokens", flags.prompt_tokens),
        read_lengths("--output-tokens", flags.output_tokens),
        max_model_len,
    )
    fp8_is_refused = any(refusal.what == "--kv-cache-dtype fp8 on a GPU" for refusal in REFUSALS)
    replicas = replicas_of(
        model,
        device,
        forecasts,
        tp_size=tp,
        memory_bytes=memory_bytes,
        max_num_seqs=flags.max_num_seqs,
        split_fp8_note="the engine refuses it on GPUs today" if fp8_is_refused else "",
    )
    print_plain(
        f"{flags.rate:g} requests/s, prompts of {lengths.mean(lambda prompt, _: prompt):,.0f} and "
        f"outputs of {lengths.output:,.0f} tokens on average; {device.name} x {tp} for a replica, "
        f"{show_size(memory_bytes)} of KV cache each; replicas {flags.load:.0%} busy at most, "
        f"kernels achieve {flags.efficiency:.0%} of the data sheet's bandwidth and FLOP/s (an "
        "assumption: measure with `rlkv bench`)"
    )
    columns = ["cache", "at once", "limit", "ms/token", "tok/s", "requests/s", "replicas", "GPUs"]
    table = new_table(*columns, *(["simulated tok/s"] if flags.simulate else []), "")
    for replica in replicas:
        found = sustained(replica, lengths, flags.tpot and flags.tpot / 1e3)
        count = found.replicas(flags.rate, flags.load)
        table.add_row(
            replica.name,
            f"{found.running:,.0f}",
            found.limit,
            f"{found.step_seconds * 1e3:.2f}",
            f"{found.tokens_per_s:,.0f}",
            f"{found.requests_per_s:.3g}",
            str(count),
            str(count * tp),
            *([_simulated(replica, found, lengths)] if flags.simulate else []),
            replica.note,
        )
    print_plain(table)


def _simulated(replica: Replica, found: Sustained, lengths: Lengths) -> str:
    """Tokens per second by vLLM's scheduler, with as many requests at once as in the plan."""
    from rlkv_vllm.bench.simulate import simulate

    if found.limit == "--tpot":
        replica = replace(replica, max_num_seqs=round(found.running))
    simulated = simulate(replica, lengths, requests=max(100, round(4 * found.running)))
    return f"{simulated.tokens_per_s:,.0f}"
