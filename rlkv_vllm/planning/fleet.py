"""How many replicas a traffic needs, with a full cache and with a split one.

The model is a replica in its steady state under load: as many requests run as its pool, its limits
and the wanted speed allow, every step takes the roofline's time, and each request that ends makes
room for the prefill of another. `rlkv_vllm/bench/simulate.py` compares this with vLLM's scheduler.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlkv_vllm.allocation.forecast import NULL_BLOCKS, Forecast
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.planning.roofline import Device, HeadCache, ModelSize, Roofline

_GIB = 2**30
#: From NVIDIA's data sheets: memory, bandwidth, dense bfloat16 operations.
GPUS = {
    device.name: device
    for device in (
        Device("A10", 24 * _GIB, 0.600e12, 125e12),
        Device("L4", 24 * _GIB, 0.300e12, 121e12),
        Device("L40S", 48 * _GIB, 0.864e12, 362e12),
        Device("A100-40GB", 40 * _GIB, 1.555e12, 312e12),
        Device("A100-80GB", 80 * _GIB, 2.039e12, 312e12),
        Device("H100-80GB", 80 * _GIB, 3.350e12, 989e12),
        Device("H200", 141 * _GIB, 4.800e12, 989e12),
    )
}
#: vLLM's default share of a GPU's memory, and what activations and graphs need of that.
VLLM_SHARE, WORK_BYTES = 0.92, 3 * _GIB
#: Ages at which a request is sampled, and lengths that stand for a distribution.
_AGES, _QUANTILES = 64, 32


@dataclass(frozen=True)
class Lengths:
    """Prompt and output (tokens) of typical requests, each as likely as any other."""

    pairs: tuple[tuple[int, int], ...]

    def mean(self, function: Callable[[int, int], float]) -> float:
        return statistics.fmean(function(prompt, output) for prompt, output in self.pairs)

    @cached_property
    def output(self) -> float:
        """Mean output (tokens)."""
        return self.mean(lambda _, output: output)

    def mean_in_flight(self, function: Callable[[float], float]) -> float:
        """Mean of a function of the context, over the requests that are decoding at a moment.

        A request counts as often as its output is long: so long it is in flight.
        """
        ages = [(i + 0.5) / _AGES for i in range(_AGES)]
        return statistics.fmean(
            (
                statistics.fmean(function(prompt + output * age) for age in ages)
                for prompt, output in self.pairs
            ),
            weights=[output for _, output in self.pairs],
        )


@dataclass(frozen=True)
class Replica:
    """One engine with its cache."""

    name: str  # of the kind of cache
    roofline: Roofline
    forecast: Forecast
    is_split: bool  # whether the forecast's streaming heads are used, or the full cache
    memory_bytes: int  # KV cache of each rank
    max_num_seqs: int
    note: str  # a caveat for the reader

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        if self.is_split:
            return self.forecast.num_blocks(self.memory_bytes)
        return self.forecast.stock_num_blocks(self.memory_bytes)

    def blocks(self, tokens: int) -> int:
        """Blocks that a request of `tokens` holds."""
        if self.is_split:
            return self.forecast.blocks_per_request(tokens)
        return self.forecast.geometry.full_blocks(tokens)


@dataclass(frozen=True)
class Sustained:
    """A replica under load."""

    running: float  # requests at once
    limit: str  # what limits them
    step_seconds: float  # mean time of a step, so between two tokens of a request
    requests_per_s: float  # completed
    tokens_per_s: float  # generated

    def replicas(self, requests_per_s: float, load: float) -> int:
        """Replicas for a traffic, none of them busier than `load`."""
        return max(1, math.ceil(requests_per_s / (load * self.requests_per_s) - 1e-9))


def sustained(replica: Replica, lengths: Lengths, tpot_seconds: float | None = None) -> Sustained:
    """What a replica completes when requests always wait, in `tpot_seconds` a token if given.

    Raises:
        RlkvError: the longest request does not fit, or a single one is slower than the limit.
    """
    longest = max(prompt + output for prompt, output in lengths.pairs)
    pool = replica.num_blocks - NULL_BLOCKS
    if replica.blocks(longest) > pool:
        raise RlkvError(
            f"{replica.name}: a request of {longest:,} tokens does not fit in the cache of "
            f"{replica.memory_bytes / _GIB:.1f} GiB per rank: more --tp, a larger --gpu or shorter "
            "requests"
        )
    held = lengths.mean_in_flight(lambda context: replica.blocks(math.ceil(context)))
    read = lengths.mean_in_flight(replica.roofline.cache.head_tokens)
    # vLLM admits a prompt as soon as it fits: on average half a prompt's blocks stay free.
    starting = lengths.mean(lambda prompt, _: replica.blocks(prompt))
    by_limit = {"memory": (pool - starting / 2) / held, "--max-num-seqs": replica.max_num_seqs}
    limit = min(by_limit, key=by_limit.__getitem__)
    running = max(1.0, by_limit[limit])
    # Requests that grow preempt the youngest ones, which are computed again: as often as a
    # prompt's blocks fit into that growth.
    grown = lengths.mean(lambda prompt, output: replica.blocks(prompt + output)) - starting

    def step_seconds(count: float) -> float:
        is_full = count >= by_limit["memory"]
        prefills = 1 + grown / starting if is_full else 1.0
        return _mean_step(replica.roofline, lengths, count, read, prefills)

    if tpot_seconds is not None and step_seconds(running) > tpot_seconds:
        if step_seconds(1.0) > tpot_seconds:
            raise RlkvError(
                f"--tpot {tpot_seconds * 1e3:g}: one request alone takes "
                f"{step_seconds(1.0) * 1e3:.2f} ms for a token with {replica.name}: allow more, "
                "or more --tp"
            )
        low, high = 1.0, running
        while high - low > 0.01:
            middle = (low + high) / 2
            low, high = (middle, high) if step_seconds(middle) <= tpot_seconds else (low, middle)
        running, limit = low, "--tpot"
    seconds = step_seconds(running)
    rate = running / (max(1.0, lengths.output - 1) * seconds)
    return Sustained(running, limit, seconds, rate, rate * lengths.output)


def _mean_step(
    roofline: Roofline, lengths: Lengths, running: float, read: float, prefills: float
) -> float:
    """Mean time of a step of `running` requests, the prefills of their successors among them."""
    starts = prefills * running / max(1.0, lengths.output - 1)  # prompts per step
    decode = roofline.step_seconds(running, running * read)
    # A prompt fills a step of its own or comes with others: the operations are the same.
    each = max(1.0, starts)
    pairs = each * lengths.mean(lambda prompt, _: roofline.cache.pairs(0, prompt))
    tokens = each * lengths.mean(lambda prompt, _: prompt)
    with_prompts = roofline.step_seconds(
        running, running * read, prompt_tokens=tokens, prompt_pairs=pairs, prompts=each
    )
    return decode + min(1.0, starts) * (with_prompts - decode)


def read_lengths(flag: str, text: str) -> list[int]:
    """Typical lengths of a flag: `N`, `N-M` (evenly between), or `MEDIAN~P95` (log-normal)."""
    steps = [(i + 0.5) / _QUANTILES for i in range(_QUANTILES)]
    separator = next((mark for mark in "~-" if mark in text), None)
    try:
        low, high = map(float, text.split(separator)) if separator else [float(int(text))] * 2
        if not 0 < low <= high:
            raise ValueError
    except ValueError:
        raise RlkvError(
            f"{flag} {text}: give tokens as N, as LEAST-MOST (evenly between), or as MEDIAN~P95 "
            "(log-normal), such as 3000 or 1000-4000 or 3000~9000"
        ) from None
    if separator == "~":
        normal = statistics.NormalDist()
        sigma = math.log(high / low) / normal.inv_cdf(0.95)
        lengths = [low * math.exp(sigma * normal.inv_cdf(step)) for step in steps]
    else:
        lengths = [low + (high - low) * step for step in steps[: None if separator else 1]]
    return [max(1, round(length)) for length in lengths]


def pair_lengths(prompts: Sequence[int], outputs: Sequence[int], longest: int) -> Lengths:
    """Prompts and outputs independent of each other, of at most `longest` tokens together."""
    if max(prompts) >= longest:
        raise RlkvError(
            f"--prompt-tokens: up to {max(prompts):,} tokens leave no room for an answer in "
            f"--max-model-len {longest:,}"
        )
    # A stride without a common divisor with the number of outputs reaches all of them.
    count, stride = max(len(prompts), len(outputs)), 13
    found = (
        (prompts[i % len(prompts)], outputs[i * stride % count % len(outputs)])
        for i in range(count)
    )
    return Lengths(tuple((prompt, min(output, longest - prompt)) for prompt, output in found))


def replicas_of(
    model: ModelSize,
    device: Device,
    forecasts: dict[int, Forecast],
    *,
    tp_size: int,
    memory_bytes: int,
    max_num_seqs: int,
    split_fp8_note: str,
) -> list[Replica]:
    """The four kinds of cache; `forecasts` by bytes per element: of the model's type, 1 for FP8."""
    return [
        Replica(
            name=("split" if is_split else "full cache") + (" + FP8" if dtype_bytes == 1 else ""),
            roofline=Roofline(
                device, model, HeadCache.of(forecast, model, is_split=is_split), tp_size
            ),
            forecast=forecast,
            is_split=is_split,
            memory_bytes=memory_bytes,
            max_num_seqs=max_num_seqs,
            note=split_fp8_note if is_split and dtype_bytes == 1 else "",
        )
        for is_split in (False, True)
        for dtype_bytes, forecast in forecasts.items()
    ]
