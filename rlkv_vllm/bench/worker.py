"""One engine in a process of its own: it takes orders on stdin and answers on stdout.

The parent alternates the turns of several such processes, so that a machine whose speed drifts is
unfair to none.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

#: What begins a line that is meant for the parent; libraries print too.
MARK = "RLKV-BENCH "


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with.

    Attributes:
        variant: stock, split or all-full.
        model: folder or Hub id.
        options: arguments of ``vllm.LLM``.
        split: ``additional_config["rlkv"]``; None: stock vLLM, the plugin not loaded.
        threads: of a CPU engine.
    """

    variant: str
    model: str
    options: dict[str, Any]
    split: dict[str, Any] | None
    threads: int

    def environment(self) -> dict[str, str]:
        """What the process needs beside the parent's own."""
        return {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the cases look into the scheduler
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_PLUGINS": "none" if self.split is None else "rlkv",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_NO_USAGE_STATS": "1",
        }


def main() -> int:
    """Start the engine, then serve orders until stdin ends."""
    spec = EngineSpec(**json.loads(sys.argv[1]))
    started = float(sys.argv[2])
    # Libraries write to stdout too, some below Python.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(MARK + json.dumps(values), file=answers, flush=True)

    from rlkv_vllm.bench.cases import CASES
    from rlkv_vllm.bench.engine import Engine, probe_device
    from rlkv_vllm.engine.launch import start
    from rlkv_vllm.errors import RlkvError

    before = time.perf_counter()
    try:
        llm = start(spec.model, spec.split, **spec.options)
    except RlkvError as error:
        answer(error=str(error))
        return 2
    engine_seconds = time.perf_counter() - before
    vocab = llm.llm_engine.model_config.get_vocab_size()
    engine = Engine(llm, vocab, spec.variant)
    engine.generate([[5, 6, 7]], 1)
    process_seconds = time.time() - started
    engine.fill_cache()
    answer(
        engine_seconds=engine_seconds,
        process_seconds=process_seconds,
        num_blocks=engine.num_blocks,
        block_size=engine.config.cache_config.block_size,
    )
    case = point = state = None
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "probe":
            answer(**asdict(probe_device(order["dtype_bytes"])))
        elif order["do"] == "prepare":
            case, point = CASES[order["case"]](), order["point"]
            state = case.prepare(engine, point)
            answer()
        elif order["do"] == "turn":
            assert case is not None
            assert point is not None
            answer(**case.turn(engine, point, state))
        elif order["do"] == "finish":
            assert case is not None
            case.finish(engine, state)
            case = point = state = None
            answer()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without vLLM's exit handlers, which log about the engine that is not needed any more.
    os._exit(status)
