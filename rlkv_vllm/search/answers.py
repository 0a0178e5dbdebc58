"""Which problems a model solves with which streaming heads: the answers that a search asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from rlkv_vllm.allocation.streaming import Streaming, name_of
from rlkv_vllm.store import Store

#: Gets problems, the streaming heads for each, and a seed; says which are solved.
Evaluate = Callable[[Sequence[int], Sequence[Streaming], int], Sequence[bool]]


class Answers:
    """For every allocation asked about, which of the first problems of a list it solves.

    The order of the answers depends on the questions alone, so that a killed search goes on as
    it would have without. `store` is written after every `chunk` answers; `count` is the number of
    answers so far. `report` is called with it, and with how many of the chunk are right, in words.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        store: Store,
        chunk: int,
        *,
        seed: int = 0,
        report: Callable[[int, str], None] = lambda answers, state: None,
    ) -> None:
        self._evaluate, self._store, self._chunk = evaluate, store, chunk
        self._seed, self._report = seed, report
        self._solved: dict[str, str] = store.content.setdefault("solved", {})
        self.count = sum(map(len, self._solved.values()))

    def ask(self, wanted: Iterable[Streaming], problems: int) -> dict[Streaming, float]:
        """The share of the first `problems` problems that each allocation solves."""
        every = sorted(set(wanted))
        asked = [
            (streaming, problem)
            for streaming in every
            for problem in range(len(self._solved.get(name_of(streaming), "")), problems)
        ]
        for start in range(0, len(asked), self._chunk):
            part = asked[start : start + self._chunk]
            solved = self._evaluate(
                [problem for _, problem in part],
                [streaming for streaming, _ in part],
                self._seed + self.count,
            )
            for (streaming, _), is_solved in zip(part, solved, strict=True):
                name = name_of(streaming)
                self._solved[name] = self._solved.get(name, "") + "01"[is_solved]
            self.count += len(part)
            self._store.save()
            self._report(self.count, f"{sum(solved)} of the last {len(part)} solved")
        return {one: fmean(self.solved(one, 0, problems)) for one in every}

    def solved(self, streaming: Streaming, first: int, last: int) -> list[bool]:
        """Which of the problems ``first:last``, all asked for before, are solved."""
        return [bit == "1" for bit in self._solved[name_of(streaming)][first:last]]

    def known(self, nested: Iterable[Streaming], most: int) -> int:
        """How many of the first `most` problems were asked for, with every allocation."""
        return min(most, *(len(self._solved[name_of(streaming)]) for streaming in nested))
