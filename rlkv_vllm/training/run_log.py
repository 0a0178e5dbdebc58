"""What a run writes while it goes on: figures and gates of every step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import write_text_atomic
from rlkv_vllm.hf.gated_attention import GatedAttention
from rlkv_vllm.training.run_folder import GATES_LOG_FILE, METRICS_FILE, step_rows

#: Steps over which the reward is averaged before it is compared with tau.
SMOOTHING = 5

#: Called after every step with its figures and the number of steps in all.
OnStep = Callable[[dict[str, Any], int], None]


class RunLog(TrainerCallback):
    """Appends a line per step to `metrics.jsonl` and `gates.jsonl`, and stops a collapsed run.

    Called before TensorBoard and other loggers, it gives them the figures of the gates too. A run
    is stopped after `collapse_steps` steps in a row with a reward below `tau`.
    """

    def __init__(
        self, output: Path, gates: GatedAttention, tau: float, collapse_steps: int, on_step: OnStep
    ) -> None:
        self._output, self._gates, self._on_step = output, gates, on_step
        self._tau, self._collapse_steps = tau, collapse_steps
        self._failed = 0
        self._before = self._started = 0.0
        self.collapsed_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what came after the checkpoint that a run resumes from."""
        if state.is_world_process_zero:
            rows = _cut(self._output / METRICS_FILE, state.global_step)
            _cut(self._output / GATES_LOG_FILE, state.global_step)
            self._before = rows[-1]["elapsed"] if rows else 0.0
            self._failed = 0
            for row in rows:
                self._failed = self._failed + 1 if row["reward"] < self._tau else 0
        if args is not None and args.world_size > 1:
            # All processes have to stop at the same step.
            counts = [self._failed]
            broadcast_object_list(counts)
            self._failed = counts[0]
        self._started = time.monotonic()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """One line per step; adds figures of the gates to `logs`."""
        if not logs or logs.get("reward") is None:
            return
        values = self._gates.values()
        flat = [gate for row in values for gate in row]
        shares = {
            "gate_mean": sum(flat) / len(flat),
            "gate_low": sum(gate < 0.1 for gate in flat) / len(flat),
            "gate_high": sum(gate > 0.9 for gate in flat) / len(flat),
        }
        logs.update({f"rlkv/{name}": value for name, value in shares.items()})
        self._failed = self._failed + 1 if logs["reward"] < self._tau else 0
        if self._failed >= self._collapse_steps:
            self.collapsed_at = state.global_step
            control.should_training_stop = True
        if not state.is_world_process_zero:
            return
        row = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "reward": logs["reward"],
            "reward_std": logs.get("reward_std"),
            "loss": logs.get("loss"),
            "penalty": logs.get("rlkv/penalty"),
            **shares,
            "output_tokens": logs.get("completions/mean_length"),
            "clipped": logs.get("completions/clipped_ratio"),
            "logprob_difference": logs.get("sampling/sampling_logp_difference/mean"),
            "gates_lag": logs.get("rlkv/gates_lag"),
            "seconds": logs.get("step_time"),
            "elapsed": self._before + time.monotonic() - self._started,
        }
        gates = {"step": state.global_step, "gates": values}
        for name, line in ((METRICS_FILE, row), (GATES_LOG_FILE, gates)):
            with (self._output / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._on_step(row, state.max_steps)


def best_gates(output: Path, tau: float, average_steps: int) -> tuple[list[list[float]], int]:
    """The gates of a run: those of the last step at which the model still reasoned well.

    That is the last step with a mean reward of at least `tau` over the `SMOOTHING` steps around
    it; a run that did not collapse has its very last steps. The penalty makes later gates the
    more telling ones.

    Returns gates ``[layers][KV heads]``, averaged over `average_steps` up to that step, and the
    step; an `RlkvError` if no step qualifies.
    """
    tables = {row["step"]: row["gates"] for row in _read(output / GATES_LOG_FILE)}
    # A kill or a damaged log may leave a step with figures and no gates.
    metrics = [row for row in _read(output / METRICS_FILE) if row["step"] in tables]
    if not metrics:
        raise RlkvError(
            f"{output}: no step of training is on record: raise trainer.max_steps, or delete the "
            "folder and start again"
        )
    rewards = [row["reward"] for row in metrics]
    side = SMOOTHING // 2
    good = [
        i for i in range(len(rewards)) if fmean(rewards[max(0, i - side) : i + side + 1]) >= tau
    ]
    if not good:
        raise RlkvError(
            f"{output}: the reward was below tau {tau} from the beginning: the model does not "
            "solve its own curriculum with these settings; lower trainer.temperature or tau"
        )
    steps = [row["step"] for row in metrics[max(0, good[-1] + 1 - average_steps) : good[-1] + 1]]
    chosen = [tables[step] for step in steps]
    gates: list[list[float]] = np.mean(chosen, axis=0).tolist()
    return gates, steps[-1]


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a log, in the order of their steps."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return list(step_rows(text)[0].values())


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop rows after `step`; returns what stays."""
    kept = [row for row in _read(path) if row["step"] <= step]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
