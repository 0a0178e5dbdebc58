"""The worker process of `rlkv_vllm.tasks.checker`.

Requests by `check`, with their keys:

- `math` (`gold`, `said`): `score` 1 if `said` ends in a formula equal to `gold`, else 0.
- `gym` (`name`, `entry`, `answer`): `score` of reasoning-gym's own scorer.
- `gym-problems` (`name`, `n`, `seed`): `entries` of reasoning-gym, or `unknown`, names like `name`.

A reply with `error` does not depend on the answer.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import resource
import signal
import threading
import warnings
from functools import cache
from multiprocessing import connection, parent_process
from typing import Any

#: How much memory checks may add to the process.
MAX_MEMORY_BYTES = 4 * 2**30


def prepare() -> None:
    """Prepare the process: no output, no Ctrl-C, a memory limit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    warnings.simplefilter("ignore")
    # It warns that its own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    os.setsid()  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Without a handler, SIGPROF ends the process at once, also in C code.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        with open("/proc/self/statm") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY_BYTES, hard))
    except (ValueError, OSError):
        pass  # some systems have no such limit


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(0)


def reply(request: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
    """The reply to a request; after `cpu_seconds`, unless 0, SIGPROF ends the process."""
    check = {"math": _math, "gym": _gym, "gym-problems": _gym_problems}[request["check"]]
    try:
        # Imports and data files take seconds and do not count as time of the check.
        if check is _math:
            import math_verify  # noqa: F401
        else:
            import reasoning_gym  # noqa: F401
        if check is _gym:
            _gym_scorer(request["name"])
    except Exception as error:
        return {"error": f"{request['check']} cannot be imported ({error!r}): install it again"}
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return check(request)
    except Exception as error:
        if check is _gym_problems:
            return {
                "error": f"task gym:{request['name']}: reasoning-gym cannot make it in its default "
                f"form ({error!r}): choose another one"
            }
        return {"score": 0.0}  # the scorer failed on the answer
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _math(request: dict[str, Any]) -> dict[str, Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    latex = LatexExtractionConfig(boxed_match_priority=0)
    gold = parse(f"\\boxed{{{request['gold']}}}", [latex], parsing_timeout=None)
    if not gold:
        return {"score": 0.0}
    said = parse(
        request["said"],
        [latex, ExprExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return {"score": float(verify(gold, said, timeout_seconds=None))}


def _gym(request: dict[str, Any]) -> dict[str, Any]:
    dataset = _gym_scorer(request["name"])
    scores = []
    # Some scorers compare with tuples, which JSON does not have.
    for entry in (request["entry"], _with_tuples(request["entry"])):
        try:
            scores.append(float(dataset.score_answer(request["answer"], entry)))
        except Exception:
            scores.append(0.0)
    return {"score": min(1.0, max(0.0, *scores))}


@cache
def _gym_scorer(name: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _gym_problems(request: dict[str, Any]) -> dict[str, Any]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, n = request["name"], request["n"]
    if name not in DATASETS:
        return {"unknown": difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4)}
    random.seed(request["seed"])  # not all of its generators have a stream of their own
    dataset = reasoning_gym.create_dataset(name, size=n, seed=request["seed"])
    return {"entries": json.loads(json.dumps([dataset[i] for i in range(n)]))}
