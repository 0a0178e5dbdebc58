"""Answers of ``/v1/rlkv`` and ``/v1/rlkv/forecast``, and the figures in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.budget import Verdict

if TYPE_CHECKING:
    from rlkv_vllm.engine.config import SplitPlan
    from rlkv_vllm.profile.evidence import Within


class ProfileId(BaseModel):
    """The head profile that is served."""

    id: str = Field(description="How the user named it.")
    sha256: str = Field(description="Checksum of its canonical JSON.")
    method: str = Field(description="Scorer that made it.")


class AccuracyBudget(BaseModel):
    """The accuracy budget that chose the sparsity, and what the profile's evaluation rows say."""

    max_loss: float = Field(description="Accuracy that may be lost, a share of the answers.")
    verdict: Literal["proven", "measured"] = Field(description="Of the weakest row.")
    loss: float = Field(description="Accuracy lost in that row; below 0: gained.")
    loss_bound: float | None = Field(
        description="Its one-sided 95% bound; null where the row has none."
    )
    n: int = Field(description="Problems of that row.")
    tasks: list[str] = Field(description="Tasks on which the sparsity is within the budget.")

    @classmethod
    def of(cls, within: Within) -> AccuracyBudget:
        """The figures of the weakest row."""
        weakest = within.weakest
        return cls(
            max_loss=within.budget.max_loss,
            verdict="proven" if within.verdict is Verdict.PROVEN else "measured",
            loss=weakest.loss.estimate,
            loss_bound=weakest.loss.high if math.isfinite(weakest.loss.high) else None,
            n=weakest.row.n,
            tasks=within.tasks,
        )


class Heads(BaseModel):
    """KV heads of the model by kind."""

    full: int
    streaming: int
    full_per_layer: list[int]
    streaming_per_layer: list[int]


class HeadMap(BaseModel):
    """Every KV head, [layer][KV head]."""

    gates: list[list[float]] = Field(description="Gates in [0, 1].")
    full: list[list[bool]] = Field(description="Whether it is a full head.")


class Compared(BaseModel):
    """A figure of the split cache and of a full cache."""

    split: int
    full: int


class ByKind(BaseModel):
    """A figure of full heads and of streaming heads."""

    full: int
    streaming: int


class Capacity(BaseModel):
    """The KV cache, all workers together."""

    bytes: int
    blocks: int = Field(description="Blocks that requests can hold.")
    block_size: int = Field(description="Tokens of one block.")
    block_bytes: int = Field(description="Bytes of one block.")
    requests: Compared = Field(description="Requests of `max_model_len` at once.")


class CacheUse(BaseModel):
    """The KV cache now, all workers together."""

    bytes: ByKind
    blocks: ByKind
    full_cache_bytes: int = Field(description="What a full cache would hold for the same requests.")
    saved_bytes: int = Field(description="The difference.")
    requests_running: int


class SplitStatus(BaseModel):
    """The split cache of this server."""

    active: Literal[True] = Field(description="Proven at start, for every worker.")
    models: list[str] = Field(description="Names under which the model is served.")
    profile: ProfileId
    sparsity: float = Field(description="Share of KV heads that are streaming heads.")
    accuracy_budget: AccuracyBudget | None = Field(
        description="null where the user chose the sparsity."
    )
    sink: int = Field(description="First tokens that a streaming head keeps.")
    window: int = Field(description="Last tokens that a streaming head keeps.")
    heads: Heads
    head_map: HeadMap
    max_model_len: int = Field(description="Longest request (tokens).")
    bytes_per_token: Compared = Field(description="One more token of a long request.")
    bytes_per_request: Compared = Field(description="A request of `max_model_len`.")
    capacity: Capacity
    example: str = Field(description="A question to try.")
    use: CacheUse | None = Field(description="null where the scheduler does not report it.")


class Reason(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: int


class Refusal(BaseModel):
    """The form of all errors of vLLM's server except the next two."""

    error: Reason


class Unauthorized(BaseModel):
    """The API key is missing or wrong."""

    error: Literal["Unauthorized"]


class Unreadable(BaseModel):
    """The body is no text; refused by FastAPI, before vLLM."""

    detail: str


class Need(BaseModel):
    """Cache that requests need."""

    bytes: int = Field(description="All of them, at their longest.")
    bytes_per_request: int
    requests_at_once: int = Field(description="How many fit.")


class SplitForecast(BaseModel):
    """Cache that a number of requests of one length need."""

    tokens: int = Field(description="Length of each request, prompt and answer together.")
    requests: int
    fits: bool = Field(description="Whether the split cache holds all of them at once.")
    split: Need
    full: Need
    saved_bytes: int
    ratio: float = Field(description="`split.bytes / full.bytes`")
    capacity_bytes: int


class CacheFigures:
    """Converts blocks into bytes of all workers; each has the same `num_blocks`."""

    def __init__(self, plan: SplitPlan, num_blocks: int) -> None:
        self.plan, self.num_blocks = plan, num_blocks
        forecast = plan.forecast
        self.usable_blocks = num_blocks - 1  # one is vLLM's null block
        self.block_bytes = sum(forecast.block_bytes(rank) for rank in forecast.ranks)
        self.full_cache_block_bytes = forecast.stock_block_bytes * len(forecast.ranks)
        self.capacity_bytes = self.usable_blocks * self.block_bytes

    def requests_possible(self, tokens: int) -> Compared:
        """Requests of that length at once; a full cache gets as many bytes on every worker."""
        forecast = self.plan.forecast
        tightest = self.num_blocks * max(forecast.block_bytes(rank) for rank in forecast.ranks)
        return Compared(
            split=forecast.requests_in(self.num_blocks, tokens),
            full=forecast.stock_requests_at_once(tokens, tightest),
        )

    def bytes_per_request(self, tokens: int) -> Compared:
        """A request of that length at its peak."""
        forecast = self.plan.forecast
        return Compared(
            split=forecast.blocks_per_request(tokens) * self.block_bytes,
            full=forecast.stock_bytes_per_request(tokens) * len(forecast.ranks),
        )

    def use(self, blocks: ByKind, full_cache_blocks: int, requests_running: int) -> CacheUse:
        """The cache now."""
        size, full_cache = self.block_bytes, full_cache_blocks * self.full_cache_block_bytes
        return CacheUse(
            bytes=ByKind(full=blocks.full * size, streaming=blocks.streaming * size),
            blocks=blocks,
            full_cache_bytes=full_cache,
            saved_bytes=full_cache - (blocks.full + blocks.streaming) * size,
            requests_running=requests_running,
        )

    def forecast(self, tokens: int | None, requests: int) -> SplitForecast:
        """Cache that `requests` of `tokens` need; None: the longest length.

        Raises:
            RlkvError: `tokens` is above the longest length.
        """
        longest = self.plan.max_model_len
        tokens = longest if tokens is None else tokens
        if tokens > longest:
            raise RlkvError(
                f"tokens={tokens}: this server's longest request is {longest} tokens "
                "(--max-model-len): ask for no more"
            )
        each, possible = self.bytes_per_request(tokens), self.requests_possible(tokens)
        split, full = (
            Need(bytes=size * requests, bytes_per_request=size, requests_at_once=at_once)
            for size, at_once in ((each.split, possible.split), (each.full, possible.full))
        )
        return SplitForecast(
            tokens=tokens,
            requests=requests,
            fits=requests <= possible.split,
            split=split,
            full=full,
            saved_bytes=full.bytes - split.bytes,
            ratio=split.bytes / full.bytes,
            capacity_bytes=self.capacity_bytes,
        )


def split_status(figures: CacheFigures, models: Sequence[str], example: str) -> SplitStatus:
    """The status without ``use``: it stays the same while the server runs."""
    plan = figures.plan
    profile, geometry = plan.profile, plan.geometry
    allocation, forecast = plan.groups.allocation, plan.forecast
    heads = range(allocation.num_kv_heads)
    full_per_layer = [len(full) for full in allocation.full]
    return SplitStatus(
        active=True,
        models=list(models),
        profile=ProfileId(
            id=plan.profile_id, sha256=profile.sha256(), method=profile.provenance.method
        ),
        sparsity=plan.sparsity,
        accuracy_budget=None if plan.within is None else AccuracyBudget.of(plan.within),
        sink=geometry.sink,
        window=geometry.window,
        heads=Heads(
            full=allocation.num_full,
            streaming=allocation.num_streaming,
            full_per_layer=full_per_layer,
            streaming_per_layer=[len(heads) - full for full in full_per_layer],
        ),
        head_map=HeadMap(
            gates=profile.gates,
            full=[[head in full for head in heads] for full in allocation.full],
        ),
        max_model_len=plan.max_model_len,
        bytes_per_token=Compared(
            split=sum(forecast.bytes_per_token(rank) for rank in forecast.ranks),
            full=forecast.stock_bytes_per_token * len(forecast.ranks),
        ),
        bytes_per_request=figures.bytes_per_request(plan.max_model_len),
        capacity=Capacity(
            bytes=figures.capacity_bytes,
            blocks=figures.usable_blocks,
            block_size=geometry.block_size,
            block_bytes=figures.block_bytes,
            requests=figures.requests_possible(plan.max_model_len),
        ),
        example=example,
        use=None,
    )
