"""`greedy`: heads stream one after the other, the cheapest next one first.

Greedy pruning as in Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv
1905.10650): heads are ordered by what the model loses without them, given those that
are gone already. Forward passes only.

Differences to the paper: a head is not removed but streams (hard split, the sink and window of
the profile); it is a KV head; the loss is the cross-entropy of the model's own correct answers;
and every head is rated by the loss itself, not by a gradient.

Of *n* heads an order takes n(n + 1)/2 evaluations. The rise of the loss seldom falls while more
heads stream, so the rise that was found earlier is a lower bound, and a head is evaluated again
only while its bound is the lowest (lazy evaluation, Minoux 1978,
https://doi.org/10.1007/BFb0006528). Where the rise does fall, that head may come later than in the
order of all evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Annotated

from pydantic import Field

from rlkv_vllm.allocation.streaming import Head
from rlkv_vllm.hf.answer_loss import BATCH_TOKENS, Sample, SplitLoss
from rlkv_vllm.options import Positive, Section
from rlkv_vllm.scorers.scorer import Gates, Scorer, ScoringInput

#: Evaluations per step that lazy evaluation needed on the models measured, for the estimate.
PER_STEP = 2


class Settings(Section):
    """Of the order.

    `answers` and `tokens` are how many answers are used at most, spread over their lengths, and
    how many tokens of them, prompts included; `until` is the sparsity up to which heads are chosen
    step by step, the others keep the order of their last known cost; `batch_tokens` are the tokens
    of a forward pass, padding included.
    """

    answers: Positive = 64
    tokens: Positive = 65_536
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_tokens: Positive = BATCH_TOKENS


def score_heads(given: ScoringInput) -> Gates:
    """The order of streaming as gates from 0, for the first head, to 1."""
    settings: Settings = given.settings
    samples = spread_lengths(given.samples, settings.answers, settings.tokens)

    def evaluated() -> None:
        given.save()
        if loss.evaluations == 3:  # the first ones take longer: libraries start, kernels compile
            left = max(0, expected - len(known))
            given.say(
                f"greedy: {len(samples)} answers, {sum(map(len, samples))} tokens; "
                f"{loss.seconds:.2g} s to evaluate a set of streaming heads, about {left} sets "
                f"to go: about {left * loss.seconds / 60:.2g} minutes"
            )

    known: dict[str, float] = given.work.setdefault("losses", {})
    with SplitLoss(
        given.model,
        samples,
        given.sink,
        given.window,
        batch_tokens=settings.batch_tokens,
        known=known,
        save=evaluated,
    ) as loss:
        steps = max(1, round(settings.until * len(loss.heads)))
        expected = 1 + len(loss.heads) + PER_STEP * (steps - 1)
        order = streaming_order(loss, loss.heads, steps, given.report)
    place = {head: i / max(1, len(order) - 1) for i, head in enumerate(order)}
    layers = max(layer for layer, _ in order) + 1
    return [[place[i, j] for j in range(len(order) // layers)] for i in range(layers)]


def streaming_order(
    loss: Callable[[Collection[Head]], float],
    heads: Sequence[Head],
    steps: int,
    report: Callable[[int, int, str], None] = lambda done, total, state: None,
) -> list[Head]:
    """All `heads`, the first one to stream first; `loss` is asked for sets of streaming heads.

    The first `steps` are chosen one by one; the others follow by the rise of the loss that was
    found for them last. Of equal heads the lower layer, then the lower head, comes first. `report`
    hears of heads tried alone and heads chosen, together.
    """
    total = len(heads) + steps
    start = before = loss(())
    rise: dict[Head, float] = {}
    for head in heads:
        rise[head] = loss((head,)) - before
        report(len(rise), total, f"{len(rise)} of {len(heads)} heads tried alone")
    order: list[Head] = []
    fresh = set(heads)
    while len(order) < steps:
        head = min(rise, key=lambda head: (rise[head], head))
        if head not in fresh:
            rise[head] = loss((*order, head)) - before
            fresh.add(head)
            continue
        order.append(head)
        before += rise.pop(head)
        fresh.clear()
        report(
            len(heads) + len(order),
            total,
            f"{len(order)} of {len(heads)} heads stream, cross-entropy {before - start:+.4f}",
        )
    return order + sorted(rise, key=lambda head: (rise[head], head))


def spread_lengths(samples: Sequence[Sample], count: int, tokens: int) -> list[Sample]:
    """At most `count` samples of at most `tokens`, or one; lengths are spread as those of all."""
    ranked = sorted(samples, key=len)
    for number in range(min(count, len(ranked)), 0, -1):
        chosen = [ranked[(2 * i + 1) * len(ranked) // (2 * number)] for i in range(number)]
        if sum(map(len, chosen)) <= tokens:
            break
    return chosen


SCORER = Scorer(
    "greedy", "arXiv:1905.10650 (greedy pruning), with really split heads", score_heads, Settings
)
