"""All heads full: what the plugin costs where it saves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rlkv_vllm.bench.case import ALL_FULL, STOCK, Point, Setup
from rlkv_vllm.bench.cases.short import Short


class Overhead(Short):
    """The same answers from a split engine without streaming heads."""

    name = "overhead"
    title = "All heads full: the plugin's own cost"
    note = "A profile at sparsity 0 computes what stock vLLM computes, on one cache layer per head."
    variants: ClassVar[tuple[str, str]] = (STOCK, ALL_FULL)

    def points(self, setup: Setup, *, full: bool) -> Sequence[Point]:
        """Short and longer contexts."""
        prompts = [n for n in (64, 1024) if n + 64 < setup.max_model_len]
        return [{"batch": 4, "prompt": prompt, "output": 64} for prompt in prompts]
