"""The least time of a step of the model: bytes to read, and operations to do.

The roofline model (Williams, Waterman and Patterson 2009): each part of a step takes the time of
its bytes or of its operations, whichever is longer. Launches, scheduling and sampling cost nothing
here, so these are bounds; `rlkv bench` shows how near a machine comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlkv_vllm.allocation.forecast import Forecast
from rlkv_vllm.errors import RlkvError


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a dense decoder."""

    layers: int
    hidden: int
    intermediate: int  # of the feed-forward layers, which have three matrices
    q_heads: int  # per layer
    kv_heads: int  # per layer
    head_dim: int
    vocab: int = 4096
    dtype_bytes: int = 2  # of a weight
    tied: bool = False  # input and output embeddings are one matrix

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype_bytes: int = 2) -> ModelSize:
        """From the `config.json` of a dense decoder, with all sizes and without experts."""
        experts = [key for key in config if "experts" in key and config[key]]
        if experts:
            raise RlkvError(
                f"config.json has {experts[0]}: a model with experts reads only some of its "
                "weights in a step, which this estimate does not cover"
            )

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name, default)
            if not isinstance(value, int) or value < 1:
                raise RlkvError(f"config.json: {name} {value!r}: must be a whole number from 1 up")
            return value

        hidden, q_heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            layers=size("num_hidden_layers"),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            q_heads=q_heads,
            kv_heads=size("num_key_value_heads", q_heads),
            head_dim=config.get("head_dim") or hidden // q_heads,
            vocab=size("vocab_size"),
            dtype_bytes=dtype_bytes,
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def token_bytes(self) -> int:
        """Key and value of one token in all heads."""
        return self.layers * self.kv_heads * 2 * self.head_dim * self.dtype_bytes

    @property
    def step_weights(self) -> int:
        """Weights that a step reads: all but the input embeddings."""
        heads = (2 * self.q_heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate) + self.head_weights

    @property
    def head_weights(self) -> int:
        """Weights of the output layer, which only sampled tokens pass."""
        return self.hidden * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Bytes of `step_weights`."""
        return self.step_weights * self.dtype_bytes

    @property
    def resident_bytes(self) -> int:
        """All weights in memory, input embeddings included."""
        embeddings = 0 if self.tied else self.head_weights
        return (self.step_weights + embeddings) * self.dtype_bytes


@dataclass(frozen=True)
class Device:
    """What one accelerator, or the machine, can do."""

    name: str
    memory_bytes: int
    bytes_per_s: float  # that it reads
    flops_per_s: float  # of matrix products in the model's precision

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The bound for one part of a step."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class HeadCache:
    """What attention reads on one rank."""

    num_full: int  # heads of all layers
    num_streaming: int  # heads of all layers
    ring: int  # tokens that a streaming head sees, sink and window
    head_dim: int
    q_per_kv: int  # query heads per KV head
    dtype_bytes: int = 2  # of an element of the cache

    @classmethod
    def of(cls, forecast: Forecast, model: ModelSize, *, is_split: bool = True) -> HeadCache:
        """The cache, split or full, of the rank that reads most: that with the most full heads."""
        allocation, geometry = forecast.groups.allocation, forecast.geometry
        num_full = max(map(allocation.num_full_on, forecast.ranks))
        heads = allocation.num_layers * allocation.heads_per_rank
        return cls(
            num_full=num_full if is_split else heads,
            num_streaming=heads - num_full if is_split else 0,
            ring=geometry.sink + geometry.window,
            head_dim=model.head_dim,
            q_per_kv=model.q_heads // model.kv_heads,
            dtype_bytes=geometry.dtype_bytes,
        )

    def head_tokens(self, context: float) -> float:
        """Keys that one query position sees, over all KV heads."""
        return self.num_full * context + self.num_streaming * min(context, self.ring)

    def pairs(self, first: int, last: int) -> float:
        """Pairs of query position and visible key for positions `first` to `last`."""
        full = (last * last - first * first) / 2
        start, end = min(first, self.ring), min(last, self.ring)  # while the ring is not full
        ring = (end * end - start * start) / 2 + self.ring * (last - end - (first - start))
        return self.num_full * full + self.num_streaming * ring

    def flops(self, pairs: float) -> float:
        """Operations of attention for so many pairs."""
        return 4 * self.head_dim * self.q_per_kv * pairs


@dataclass(frozen=True)
class Roofline:
    """Bounds of steps of one model with one cache."""

    device: Device  # of one rank
    model: ModelSize  # of all ranks together
    cache: HeadCache  # of one rank
    tp_size: int = 1  # ranks; communication between them costs nothing here

    def step_seconds(
        self,
        decodes: float = 0,
        head_tokens: float = 0,
        *,
        prompts: float = 0,
        prompt_tokens: float = 0,
        prompt_pairs: float = 0,
    ) -> float:
        """One step of `decodes` requests that make a token, and of a chunk each of `prompts`.

        `head_tokens` and `prompt_pairs` are those of `HeadCache`, summed over requests and chunks.
        """
        tokens = decodes + prompt_tokens
        if not tokens:
            return 0.0
        model, cache = self.model, self.cache
        body = (model.step_weights - model.head_weights) * tokens
        head = model.head_weights * (decodes + prompts)
        linear = self.device.seconds(
            model.weight_bytes / self.tp_size, 2 * (body + head) / self.tp_size
        )
        decode = self.device.seconds(
            head_tokens * 2 * cache.head_dim * cache.dtype_bytes, cache.flops(head_tokens)
        )
        return linear + decode + cache.flops(prompt_pairs) / self.device.flops_per_s

    def decode_seconds(self, batch: int, context: float) -> float:
        """A decode step of `batch` requests of the same length."""
        return self.step_seconds(batch, batch * self.cache.head_tokens(context))

    def prefill_seconds(self, tokens: int, cached: int = 0, chunk: int = 2048) -> float:
        """A prompt of `tokens`, the first `cached` of them in the cache, in chunks."""
        count = max(1, math.ceil((tokens - cached) / chunk))
        edges = [cached + (tokens - cached) * i // count for i in range(count + 1)]
        return sum(
            self.step_seconds(
                prompts=1, prompt_tokens=end - start, prompt_pairs=self.cache.pairs(start, end)
            )
            for start, end in itertools.pairwise(edges)
        )
