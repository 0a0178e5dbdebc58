"""Cross-entropy of the model's own answers with streaming heads: which allocations look good."""

from __future__ import annotations

from collections.abc import Callable

from rlkv_vllm.allocation.streaming import Streaming, name_of
from rlkv_vllm.store import Store


class Losses:
    """For every allocation asked about, the cross-entropy of the answers (nats per token).

    Each is evaluated once; `store` is written after every evaluation. `report` is called with
    their number so far.
    """

    def __init__(
        self,
        evaluate: Callable[[Streaming], float],
        store: Store,
        *,
        report: Callable[[int], None] = lambda evaluations: None,
    ) -> None:
        self._evaluate, self._store, self._report = evaluate, store, report
        self._known: dict[str, float] = store.content.setdefault("losses", {})

    @property
    def count(self) -> int:
        """Number of evaluations so far."""
        return len(self._known)

    def __call__(self, streaming: Streaming) -> float:
        """The cross-entropy while exactly these heads stream."""
        name = name_of(streaming)
        if name not in self._known:
            self._known[name] = self._evaluate(streaming)
            self._store.save()
            self._report(self.count)
        return self._known[name]
