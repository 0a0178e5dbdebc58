"""Answers of a model in transformers, with streaming heads by mask.

Saves no memory and is slow, but is exact and needs no vLLM: for choosing a scorer or a sparsity,
and for checking what the engine serves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlkv_vllm.answers import Answer, Sampling
from rlkv_vllm.hf.gated_attention import GatedAttention, attach_gates
from rlkv_vllm.tasks import is_solved, output_text
from rlkv_vllm.tasks.measurement import Measurement

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from rlkv_vllm.tasks import Problem, Task


@dataclass(frozen=True)
class HeadSplit:
    """The full KV heads of every layer, and the tokens that the streaming heads see.

    The window includes the query's own token.
    """

    full_heads: Sequence[Collection[int]]
    sink: int
    window: int


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    *,
    sampling: Sampling,
    samples: int = 1,
    split: HeadSplit | Sequence[HeadSplit] | None = None,
    batch_size: int = 64,
    report: Callable[[int, int, str], None] = lambda done, total, state: None,
) -> Measurement:
    """Answer at least one problem in batches padded on the left; answers keep their order.

    With several `samples` the answers to a problem stand in a row.

    Args:
        model: a Hugging Face decoder; ungated, and unchanged afterwards.
        tokenizer: with a chat template.
        task: scores the answers.
        problems: to answer.
        sampling: how tokens are chosen.
        samples: answers per problem.
        split: None is the plain model; a list has one per problem, of the same sink and window.
        batch_size: answers written together.
        report: called after every batch with (answers written, answers in all, "N solved").
    """
    problems = [problem for problem in problems for _ in range(samples)]
    if isinstance(split, Sequence):
        split = [one for one in split for _ in range(samples)]
    prompts = prompt_ids(tokenizer, problems)
    # Alike lengths side by side need little padding; longest first shows memory limits early.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    ends = _end_ids(model, tokenizer) | set(sampling.stop_token_ids)
    next_tokens = _next_tokens(sampling, model.device)
    was_training = model.training
    model.eval()
    try:
        with _attach(model, split) as gates, torch.no_grad():
            if gates is not None and isinstance(split, HeadSplit):
                gates.set_hard(split.full_heads)
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                if gates is not None and isinstance(split, Sequence):
                    gates.set_hard_each([split[i].full_heads for i in batch])
                outputs = _generate(
                    model,
                    [prompts[i] for i in batch],
                    tokenizer.pad_token_id or 0,  # masked: any token would do
                    ends,
                    sampling.max_tokens,
                    next_tokens,
                    sampling.repetition_penalty,
                    gates,
                )
                for i, ids in zip(batch, outputs, strict=True):
                    text = output_text(tokenizer, str(tokenizer.decode(prompts[i])), ids)
                    answers[i] = Answer(
                        prompt_ids=prompts[i],
                        token_ids=ids,
                        text=text,
                        is_correct=is_solved(task, text, problems[i]),
                        hit_cap=ids[-1] not in ends,
                    )
                solved = sum(answer.is_correct for answer in answers.values())
                report(len(answers), len(problems), f"{solved} solved")
    finally:
        model.train(was_training)
    return Measurement.of([answers[i] for i in range(len(problems))], samples=samples)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[list[int]]:
    """Token ids of problems in the model's chat template, ready for its answers."""
    texts = [
        tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)
        for problem in problems
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _attach(
    model: PreTrainedModel, split: HeadSplit | Sequence[HeadSplit] | None
) -> AbstractContextManager[GatedAttention | None]:
    if split is None:
        return nullcontext()
    if isinstance(split, HeadSplit):
        return attach_gates(model, split.sink, split.window)
    ((sink, window),) = {(one.sink, one.window) for one in split}
    return attach_gates(model, sink, window, "sdpa")


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    pad: int,
    ends: set[int],
    max_tokens: int,
    next_tokens: Callable[[torch.Tensor], torch.Tensor],
    penalty: float,
    gates: GatedAttention | None,
) -> list[list[int]]:
    """Decoding that drops finished rows.

    `generate` of transformers computes every row until the last one ends. With streaming heads a
    few rows run into the token limit, and then all rows would cost as much as these. Dropping rows
    copies the cache, so it waits until an eighth of them are finished.

    `next_tokens` maps logits ``[rows, vocabulary]`` to tokens ``[rows]``, after logits of the
    tokens that prompt and answer have so far got a repetition `penalty`. Returns the new tokens of
    every row, up to and including the one of `ends`.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    cache = _make_cache(model)
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = (torch.tensor(x, device=model.device) for x in (rows, real))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seen: torch.Tensor | None = None  # tokens so far, [rows, vocabulary]
    for _ in range(max_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        new_logits = logits[:, -1]
        if penalty != 1:
            if seen is None:
                seen = torch.zeros_like(new_logits, dtype=torch.bool)
            # Padding is no token of the prompt: it marks nothing.
            seen |= (
                torch.zeros_like(seen, dtype=torch.int32)
                .scatter_add_(1, ids, mask[:, -ids.shape[1] :].int())
                .bool()
            )
            new_logits = _penalised(new_logits, seen, penalty)
        new = next_tokens(new_logits)
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
            if gates is not None:
                gates.select_sequences(select)
            new, mask, positions = new[select], mask[select], positions[select]
            seen = None if seen is None else seen[select]
        ids = new[:, None]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
        positions = positions[:, -1:] + 1
    return outputs


def _penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits of `seen` tokens made less likely (CTRL, arXiv 1909.05858), as vLLM does."""
    worse = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, worse, logits)


def _make_cache(model: PreTrainedModel) -> Cache:
    """An empty `DynamicCache` that does not copy all keys and values for every token."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values are views of a buffer that grows by halves."""

        buffer: torch.Tensor | None = None  # [keys and values, rows, heads, tokens, head_dim]

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            before = self.get_seq_length()
            now = before + key_states.shape[-2]
            if self.buffer is None or self.buffer.shape[-2] < now:
                rows, heads, _tokens, size = key_states.shape
                grown = key_states.new_empty(2, rows, heads, now * 3 // 2, size)
                if self.buffer is not None:
                    grown[..., :before, :] = self.buffer[..., :before, :]
                self.buffer = grown
            self.buffer[0, ..., before:now, :] = key_states
            self.buffer[1, ..., before:now, :] = value_states
            self.keys, self.values = self.buffer[..., :now, :]
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            if self.buffer is not None:
                self.buffer = self.buffer[:, indices]
                self.keys, self.values = self.buffer[..., : self.get_seq_length(), :]

    cache = DynamicCache(config=model.config)
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def _next_tokens(
    sampling: Sampling, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Chooses the next tokens, with random numbers of its own."""
    if sampling.is_greedy:
        return lambda logits: logits.argmax(-1)
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as warpers

    chosen = LogitsProcessorList([warpers.TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        chosen.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chosen.append(warpers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chosen.append(warpers.MinPLogitsWarper(sampling.min_p))
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        shares = chosen(None, logits.float()).softmax(-1)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    return sample


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer, by the model's generation config and its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, tokenizer.eos_token_id} - {None}
