"""Solving a task with per-head masks in Hugging Face: the counterpart of the served engine.

Streaming heads are masked, no memory is saved: slow, but exact, and it needs no vLLM. For
choosing a scorer or a sparsity, and for checking what the engine serves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.hf.gated_attention import GatedAttention, attach_gates
from rlkv_vllm.statistics import percentile_95
from rlkv_vllm.tasks import is_solved, output_text

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from rlkv_vllm.tasks import Problem, Task


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn, where they are not the most likely ones.

    Attributes:
        temperature: > 0.
        top_p: smallest set of tokens with at least this probability.
        top_k: that many most likely tokens; 0 for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class HeadSplit:
    """Which heads see everything, and what the others see.

    Attributes:
        full_heads: full KV heads per layer.
        sink: first tokens that a streaming head sees.
        window: last tokens that a streaming head sees, the query's own included.
    """

    full_heads: Sequence[Collection[int]]
    sink: int
    window: int


@dataclass(frozen=True)
class Answer:
    """What the model said to one problem.

    Attributes:
        prompt_ids: the problem as the chat template renders it.
        output_ids: generated tokens; the end token is the last one if there is one.
        text: the output as the task scores it.
        is_correct: whether the task accepts it.
        hit_cap: whether the token limit cut it off.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    is_correct: bool
    hit_cap: bool


@dataclass(frozen=True)
class TaskResult:
    """The answers to a task, one per problem, in its order; not empty."""

    answers: list[Answer]

    @property
    def correct(self) -> list[bool]:
        """Per problem, whether it is solved: what paired tests compare."""
        return [answer.is_correct for answer in self.answers]

    @property
    def accuracy(self) -> float:
        """Share of problems solved."""
        return sum(self.correct) / len(self.answers)

    @property
    def mean_output_tokens(self) -> float:
        """Mean length of the outputs, end token included."""
        return sum(len(answer.output_ids) for answer in self.answers) / len(self.answers)

    @property
    def p95_output_tokens(self) -> int:
        """95th percentile of the lengths, end token included."""
        return percentile_95([len(answer.output_ids) for answer in self.answers])

    @property
    def capped_share(self) -> float:
        """Share of the outputs that the token limit cut off."""
        return sum(answer.hit_cap for answer in self.answers) / len(self.answers)


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    *,
    split: HeadSplit | Sequence[HeadSplit] | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 64,
    draw: Draw | None = None,
    seed: int = 0,
    report: Callable[[int], None] = lambda solved: None,
) -> TaskResult:
    """Answer `problems` in batches padded on the left, greedily unless told otherwise.

    Args:
        model: a Hugging Face decoder; ungated, and unchanged afterwards.
        tokenizer: its tokenizer, with a chat template.
        task: checks the answers.
        problems: of that task, at least one.
        split: which heads are streaming heads; a list has one per problem, all with the same
            sink and window; None is the plain model.
        max_new_tokens: where an answer is cut off.
        batch_size: problems decoded together.
        draw: how tokens are drawn; None is greedy.
        seed: of the drawing.
        report: called after every batch with the number of problems in it.

    Returns:
        The answers, in the order of `problems`.
    """
    prompts = [render(tokenizer, problem) for problem in problems]
    # Alike lengths side by side need little padding; longest first shows memory limits early.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    was_training = model.training
    choose = _chooser(draw, seed, model.device)
    model.eval()
    gates: AbstractContextManager[GatedAttention | None] = nullcontext()
    if isinstance(split, HeadSplit):
        gates = attach_gates(model, split.sink, split.window)
    elif split is not None:
        gates = attach_gates(model, *_common_span(split), "sdpa")
    try:
        with gates as handle:
            if handle is not None and isinstance(split, HeadSplit):
                handle.set_hard(split.full_heads)
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                if handle is not None and split is not None and not isinstance(split, HeadSplit):
                    handle.set_hard_each([split[i].full_heads for i in batch])
                outputs = _generate(
                    model,
                    tokenizer,
                    [prompts[i] for i in batch],
                    max_new_tokens,
                    choose,
                    handle.select_sequences if handle is not None else lambda rows: None,
                )
                for i, (ids, ended) in zip(batch, outputs, strict=True):
                    text = output_text(tokenizer, str(tokenizer.decode(prompts[i])), ids)
                    answers[i] = Answer(
                        prompt_ids=prompts[i],
                        output_ids=ids,
                        text=text,
                        is_correct=is_solved(task, text, problems[i]),
                        hit_cap=not ended,
                    )
                report(len(batch))
    finally:
        model.train(was_training)
    return TaskResult([answers[i] for i in range(len(problems))])


def _common_span(splits: Sequence[HeadSplit]) -> tuple[int, int]:
    """Sink and window of all `splits`."""
    (span,) = {(split.sink, split.window) for split in splits}
    return span


def render(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """The token ids of a problem, ready for the model's answer."""
    text = tokenizer.apply_chat_template(
        problem.messages, tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    select_rows: Callable[[torch.Tensor], None],
) -> list[tuple[list[int], bool]]:
    """Outputs up to and including the end token, and whether there was one."""
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id or 0  # masked: any token would do
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        rows = _decode(model, input_ids, attention_mask, ends, max_new_tokens, choose, select_rows)
    return [(row, row[-1] in ends) for row in rows]


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    ends: set[int],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    select_rows: Callable[[torch.Tensor], None],
) -> list[list[int]]:
    """Decoding that drops finished rows.

    `generate` carries every row along until the last one ends; with streaming heads a few rows
    run into the token limit, and they would cost as much as all of them doing so. Dropping rows
    copies the cache, so it waits until an eighth of them are finished.

    Args:
        model: any decoder with a dynamic cache.
        input_ids: [rows, tokens], padded on the left.
        attention_mask: the same shape, 1 on what is no padding.
        ends: tokens after which a row is finished.
        max_new_tokens: at least 1.
        choose: logits ``[rows, tokens]`` to tokens ``[rows]``.
        select_rows: told which rows go on, when some are dropped.
    """
    outputs: list[list[int]] = [[] for _ in input_ids]
    running = list(range(len(outputs)))
    cache = _make_cache(model)
    ids, mask = input_ids.to(model.device), attention_mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        new = choose(logits[:, -1])
        for row, token in zip(running, new.tolist(), strict=True):
            if not outputs[row] or outputs[row][-1] not in ends:
                outputs[row].append(token)
        kept = [i for i, row in enumerate(running) if outputs[row][-1] not in ends]
        if not kept:
            break
        if len(kept) <= len(running) * 7 / 8:
            running = [running[i] for i in kept]
            select = torch.tensor(kept, device=model.device)
            cache.batch_select_indices(select)
            select_rows(select)
            new, mask, positions = new[select], mask[select], positions[select]
        ids = new[:, None]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
        positions = positions[:, -1:] + 1
    return outputs


def _make_cache(model: PreTrainedModel) -> Cache:
    """An empty `DynamicCache` that does not copy all keys and values for every token."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Has room behind its keys and values; ``keys`` and ``values`` are views."""

        room: torch.Tensor | None = None  # [keys and values, rows, heads, tokens, head_dim]

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            before = self.get_seq_length()
            now = before + key_states.shape[-2]
            if self.room is None or self.room.shape[-2] < now:
                rows, heads, _tokens, size = key_states.shape
                room = key_states.new_empty(2, rows, heads, now * 3 // 2, size)
                if self.room is not None:
                    room[..., :before, :] = self.room[..., :before, :]
                self.room = room
            self.room[0, ..., before:now, :] = key_states
            self.room[1, ..., before:now, :] = value_states
            self.keys, self.values = self.room[..., :now, :]
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self.room is not None:
                self.room = self.room[:, indices]
                self.keys, self.values = self.room[..., : self.get_seq_length(), :]

    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


def _chooser(
    draw: Draw | None, seed: int, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Picks the next tokens: the most likely ones, or random ones from a stream of their own."""
    if draw is None:
        return lambda logits: logits.argmax(-1)
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(draw.temperature))])
    if draw.top_k:
        warpers.append(TopKLogitsWarper(draw.top_k))
    if draw.top_p < 1:
        warpers.append(TopPLogitsWarper(draw.top_p))
    generator = torch.Generator(device).manual_seed(seed)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        shares = warpers(None, logits.float()).softmax(-1)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    return choose


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer, by the model's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return {end for end in ends | {tokenizer.eos_token_id} if end is not None}
