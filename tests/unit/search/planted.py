"""A model whose answers and cross-entropies are known exactly, and that may be killed."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from rlkv_vllm.allocation.streaming import Head, Streaming

LAYERS, KV_HEADS = 5, 4
HEADS = [(layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)]
#: Heads that the answers need.
NEEDED = {(0, 0), (0, 3), (1, 1), (2, 0), (3, 1), (4, 2)}
#: Two heads each that do the same work: one of them has to stay full.
REDUNDANT = [{(1, 2), (2, 3)}, {(3, 0), (4, 3)}]
#: A problem is solved if this is below the share that an allocation solves.
DIFFICULTY = [random.Random(problem).random() for problem in range(512)]
Share = Callable[[set[Head]], float]


def planted(streaming: set[Head]) -> float:
    """Heads that stream though they are needed cost a fifth each."""
    lost = len(streaming & NEEDED) + sum(streaming >= pair for pair in REDUNDANT)
    return 0.95 * 0.8**lost


class PlantedModel:
    """Solves a share of the problems; the cross-entropy is its logarithm, or that of `seems`.

    It dies before call number `dies_at`, of answers or cross-entropies.
    """

    def __init__(
        self, share: Share = planted, seems: Share | None = None, *, dies_at: int = -1
    ) -> None:
        self.asked: list[tuple[int, Streaming]] = []
        self.seeds: list[int] = []
        self.evaluated: list[Streaming] = []
        self.own: list[int] = []
        self._share, self._seems, self._left = share, seems or share, dies_at

    def write_answers(
        self, problems: Sequence[int], written: list[dict[str, Any]], save: Callable[[], None]
    ) -> None:
        self._live()
        self.own = list(problems)
        written += [{"problem": problem} for problem in problems[len(written) :]]
        save()

    def cross_entropy(self, streaming: Streaming) -> float:
        self._live()
        assert self.own
        self.evaluated.append(streaming)
        return -math.log(self._seems({*streaming}))

    def solve(
        self, problems: Sequence[int], streaming: Sequence[Streaming], seed: int
    ) -> list[bool]:
        self._live()
        self.seeds.append(seed)
        pairs = list(zip(problems, streaming, strict=True))
        self.asked += pairs
        return [DIFFICULTY[problem] < self._share({*one}) for problem, one in pairs]

    def _live(self) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1


def random_share(seed: int) -> Share:
    """Random costs of heads and of pairs of them."""
    rng = random.Random(seed)
    alone = {head: rng.choice([0, 0, 0.01, 0.05, 0.2]) for head in HEADS}
    pairs = [(*rng.sample(HEADS, 2), rng.choice([0.1, 0.3])) for _ in range(10)]

    def share(streaming: set[Head]) -> float:
        lost = sum(alone[head] for head in streaming)
        lost += sum(cost for a, b, cost in pairs if streaming >= {a, b})
        return math.exp(-lost)

    return share


def as_text(model: PlantedModel) -> str:
    """All that was asked of it."""
    return json.dumps([model.asked, model.seeds, model.evaluated])
