"""Sizes of the split cache of a running engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlkv_vllm.engine.config import SplitPlan


@dataclass(frozen=True)
class SplitReport:
    """Facts of one worker about its split cache; bytes are those of its rank, sizes in tokens.

    Heads are those of the model, blocks those of the shared pool: ``num_blocks`` blocks of
    ``block_bytes`` are ``cache_bytes``. Requests are of ``max_model_len`` tokens;
    ``bytes_per_token`` is of one more token of such a request. ``full_bytes_...`` and
    ``full_requests_...`` are the same with a full cache in as many bytes.
    """

    profile: str  # as the user named it
    profile_sha256: str  # of its canonical JSON
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
        """Inverse of ``dataclasses.asdict``; other values are ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def sentence(self) -> str:
        """The capacity in one line, for the log."""
        requests = f"{self.requests_at_once:,} request{'s' if self.requests_at_once != 1 else ''}"
        return (
            f"split KV cache: {self.full_heads} full and {self.streaming_heads} streaming KV heads "
            f"(sink {self.sink}, window {self.window}), {self.num_blocks:,} blocks of "
            f"{self.block_size} tokens, {requests} of "
            f"{self.max_model_len:,} tokens at once (full cache: {self.full_requests_at_once:,})"
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """Label, split cache, full cache: what a user wants to see."""
        heads = self.full_heads + self.streaming_heads
        long = f" of {self.max_model_len:,} tokens"
        figures = [
            ("cache bytes per token", self.bytes_per_token, self.full_bytes_per_token),
            (f"cache bytes per request{long}", self.bytes_per_request, self.full_bytes_per_request),
            (f"requests at once{long}", self.requests_at_once, self.full_requests_at_once),
        ]
        return [
            ("profile", f"{self.profile} ({self.profile_sha256[:12]})", ""),
            (
                "KV heads",
                f"{self.full_heads} full, {self.streaming_heads} streaming "
                f"(sink {self.sink}, window {self.window})",
                f"{heads} full",
            ),
            *((label, f"{split:,}", f"{full:,}") for label, split, full in figures),
        ]
