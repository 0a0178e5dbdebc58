"""Sizes of the split cache of a running engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkv_vllm.engine.config import SplitPlan


@dataclass(frozen=True)
class SplitReport:
    """Facts of one worker about its split cache; bytes are those of its rank.

    Attributes:
        profile: how the user named the profile.
        profile_sha256: of the profile's canonical JSON.
        sparsity: share of streaming KV heads.
        full_heads: KV heads of the model that keep their full cache.
        streaming_heads: KV heads that keep sink and window.
        sink: first tokens kept by streaming heads.
        window: last tokens kept by streaming heads.
        block_size: tokens per block.
        num_blocks: blocks of the shared pool.
        block_bytes: bytes of one block.
        cache_bytes: bytes of the pool.
        max_model_len: longest request (tokens).
        bytes_per_token: of one more token of a long request.
        full_bytes_per_token: the same with a full cache.
        bytes_per_request: of a request of ``max_model_len``.
        full_bytes_per_request: the same with a full cache.
        requests_at_once: requests of ``max_model_len`` that fit the pool.
        full_requests_at_once: the same with a full cache in as many bytes.
    """

    profile: str
    profile_sha256: str
    sparsity: float
    full_heads: int
    streaming_heads: int
    sink: int
    window: int
    block_size: int
    num_blocks: int
    block_bytes: int
    cache_bytes: int
    max_model_len: int
    bytes_per_token: int
    full_bytes_per_token: int
    bytes_per_request: int
    full_bytes_per_request: int
    requests_at_once: int
    full_requests_at_once: int

    @classmethod
    def of(cls, plan: SplitPlan, rank: int, num_blocks: int) -> SplitReport:
        """The report of a rank whose pool has ``num_blocks`` blocks."""
        forecast, allocation = plan.forecast, plan.groups.allocation
        tokens = plan.max_model_len
        block_bytes = forecast.block_bytes(rank)
        return cls(
            profile=plan.profile_id,
            profile_sha256=plan.profile.sha256(),
            sparsity=plan.sparsity,
            full_heads=allocation.num_full,
            streaming_heads=allocation.num_streaming,
            sink=plan.geometry.sink,
            window=plan.geometry.window,
            block_size=plan.geometry.block_size,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            cache_bytes=num_blocks * block_bytes,
            max_model_len=tokens,
            bytes_per_token=forecast.bytes_per_token(rank),
            full_bytes_per_token=forecast.stock_bytes_per_token,
            bytes_per_request=forecast.bytes_per_request(tokens, rank),
            full_bytes_per_request=forecast.stock_bytes_per_request(tokens),
            requests_at_once=forecast.requests_in(num_blocks, tokens),
            full_requests_at_once=forecast.stock_requests_at_once(tokens, num_blocks * block_bytes),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitReport:
        """Inverse of :meth:`to_dict`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)

    def sentence(self) -> str:
        """The capacity in one line, for the log."""
        return (
            f"split KV cache: {self.full_heads} full and {self.streaming_heads} streaming KV heads "
            f"(sink {self.sink}, window {self.window}), {self.num_blocks:,} blocks of "
            f"{self.block_size} tokens, {self.requests_at_once:,} requests of "
            f"{self.max_model_len:,} tokens at once (full cache: {self.full_requests_at_once:,})"
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """Label, split cache, full cache: what a user wants to see."""
        heads = self.full_heads + self.streaming_heads
        tokens = f"{self.max_model_len:,} tokens"
        return [
            ("profile", f"{self.profile} ({self.profile_sha256[:12]})", ""),
            (
                "KV heads",
                f"{self.full_heads} full, {self.streaming_heads} streaming "
                f"(sink {self.sink}, window {self.window})",
                f"{heads} full",
            ),
            (
                "cache bytes per token",
                f"{self.bytes_per_token:,}",
                f"{self.full_bytes_per_token:,}",
            ),
            (
                f"cache bytes per request of {tokens}",
                f"{self.bytes_per_request:,}",
                f"{self.full_bytes_per_request:,}",
            ),
            (
                f"requests at once of {tokens}",
                f"{self.requests_at_once:,}",
                f"{self.full_requests_at_once:,}",
            ),
        ]
