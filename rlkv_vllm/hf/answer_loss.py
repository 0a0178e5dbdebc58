"""Cross-entropy of a model on its own answers, by teacher forcing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from rlkv_vllm.allocation.streaming import Head, full_heads, name_of
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.gated_attention import attach_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100
#: Tokens of a forward pass, padding included. The logits of 4,096 tokens and 152,000 words are
#: 1.2 GB in bfloat16.
BATCH_TOKENS = 4096
#: Tokens whose logits exist in float32 at once.
_BLOCK = 1024


@dataclass(frozen=True)
class Sample:
    """A prompt and the correct answer that the model itself gave, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right; all ``[samples, tokens]``.

    `labels` is `IGNORED` everywhere but on the answers' tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def make_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Put `samples` side by side."""

    def padded(rows: list[list[int]], padding: int = 0) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=padding).to(device)

    rows = [sample.prompt_ids + sample.completion_ids for sample in samples]
    labels = [[IGNORED] * len(s.prompt_ids) + s.completion_ids for s in samples]
    return Batch(padded(rows), padded([[1] * len(row) for row in rows]), padded(labels, IGNORED))


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens, in nats, in float32."""
    logits, labels = _predictions(model, batch)
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def _predictions(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[samples, tokens, words]`` and labels ``[samples, tokens]``, without the prompts."""
    first = int((batch.labels != IGNORED).any(0).nonzero()[0])
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        logits_to_keep=batch.input_ids.shape[1] - first + 1,
    ).logits
    return logits[:, :-1], batch.labels[:, first:]


class SplitLoss:
    """Mean cross-entropy of answers with really split heads, for any set of streaming heads.

    A context manager: leaving it gives the model back as it was. The result does not depend on
    `batch_tokens`, but for the last digits.

    Args:
        model: in evaluation mode, ungated.
        samples: at least one; all their answers' tokens count alike.
        sink: first tokens that a streaming head sees.
        window: last tokens that a streaming head sees, the query's own included.
        batch_tokens: of a forward pass, padding included; a longer sample is alone in one.
        known: losses by `name_of` the streaming heads. Sets in it are not evaluated; others enter
            it. Of the same model, samples, sink and window.
        save: called whenever `known` has grown.

    Attributes:
        evaluations: sets evaluated so far, without the known ones.
        tokens: tokens of all forward passes so far, padding included.
        seconds: that the newest evaluation took.
        heads: all heads of the model, by layer and number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Sample],
        sink: int,
        window: int,
        *,
        batch_tokens: int = BATCH_TOKENS,
        known: MutableMapping[str, float] | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        assert samples
        self._known: MutableMapping[str, float] = {} if known is None else known
        self._save = save
        self.evaluations = self.tokens = 0
        self.seconds = 0.0
        self._batches = [
            make_batch(group, model.device) for group in micro_batches(samples, batch_tokens)
        ]
        self._answer_tokens = sum(len(sample.completion_ids) for sample in samples)
        self._gates = attach_gates(model, sink, window)
        self._layers = len(self._gates.gates)
        self.heads: list[Head] = [
            (layer, head)
            for layer in range(self._layers)
            for head in range(self._gates.num_kv_heads)
        ]

    def __call__(self, streaming: Collection[Head]) -> float:
        """Nats per token of the answers while exactly these heads stream."""
        name = name_of(streaming)
        if name not in self._known:
            since = time.monotonic()
            self._known[name] = self._evaluate(streaming)
            self.seconds = time.monotonic() - since
            self.evaluations += 1
            self._save()
        return self._known[name]

    def _evaluate(self, streaming: Collection[Head]) -> float:
        self._gates.set_hard(full_heads(streaming, self._layers, self._gates.num_kv_heads))
        total = 0.0
        for batch in self._batches:
            with torch.no_grad():
                logits, labels = _predictions(self._gates.model, batch)
            for start in range(0, labels.shape[1], _BLOCK):
                part = slice(start, start + _BLOCK)
                total += cross_entropy(
                    logits[:, part].flatten(0, 1).float(),
                    labels[:, part].flatten(),
                    ignore_index=IGNORED,
                    reduction="sum",
                ).item()
            self.tokens += batch.input_ids.numel()
        if not math.isfinite(total):
            raise RlkvError(
                f"the cross-entropy of the model's own answers is {total} while heads "
                f"{name_of(streaming) or 'none'} stream: load the model in bfloat16 or float32"
            )
        return total / self._answer_tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gates.detach()


def micro_batches(samples: Sequence[Sample], batch_tokens: int) -> list[list[Sample]]:
    """Samples in groups of alike lengths, each of `batch_tokens` at most when padded, or alone.

    The longest come first: limits of memory show at once.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= batch_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return groups
