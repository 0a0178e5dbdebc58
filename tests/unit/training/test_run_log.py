import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.training.run_log import RunLog, best_gates


class Gates:
    def values(self) -> list[list[float]]:
        return [[0.05, 1.0], [0.5, 0.95]]


def log(output: Path, rewards: list[float], first: int = 1, collapse_steps: int = 3) -> RunLog:
    """Feeds a run; steps after a stop are not taken."""
    log = RunLog(output, Gates(), 0.5, collapse_steps, lambda row, total: None)  # type: ignore[arg-type]
    control = SimpleNamespace(should_training_stop=False)
    state = SimpleNamespace(
        is_world_process_zero=True, global_step=first - 1, epoch=0.1, max_steps=99
    )
    log.on_train_begin(None, state, control)
    for reward in rewards:
        if control.should_training_stop:
            break
        state.global_step += 1
        log.on_log(None, state, control, {"reward": reward, "step_time": 1.0})
    return log


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_per_step(tmp_path: Path) -> None:
    log(tmp_path, [0.9, 0.8])
    first, second = rows(tmp_path / "metrics.jsonl")
    assert (first["step"], second["step"], second["reward"]) == (1, 2, 0.8)
    assert first["gate_mean"] == pytest.approx(0.625)
    assert (first["gate_low"], first["gate_high"]) == (0.25, 0.5)
    assert rows(tmp_path / "gates.jsonl")[1]["gates"] == [[0.05, 1.0], [0.5, 0.95]]


def test_a_collapsed_run_stops(tmp_path: Path) -> None:
    found = log(tmp_path, [0.9, 0.4, 0.4, 0.9, 0.4, 0.3, 0.2, 0.1])
    assert found.collapsed_at == 7
    assert len(rows(tmp_path / "metrics.jsonl")) == 7


def test_a_resumed_run_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, [0.9, 0.8, 0.4, 0.4])
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "rew')
    found = log(tmp_path, [0.4, 0.4], first=4)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert found.collapsed_at == 5  # step 3 counts


def write(output: Path, rewards: list[float]) -> None:
    for name, make in (
        ("metrics.jsonl", lambda i, r: {"step": i, "reward": r}),
        ("gates.jsonl", lambda i, r: {"step": i, "gates": [[i / 10]]}),
    ):
        lines = [json.dumps(make(i, r)) + "\n" for i, r in enumerate(rewards, start=1)]
        (output / name).write_text("".join(lines))


def test_the_last_good_step_has_the_best_gates(tmp_path: Path) -> None:
    write(tmp_path, [1, 1, 1, 0.4, 0.4, 0.4, 0, 0, 0])
    # Means over the five steps around: .64 at 4, .44 at 5.
    assert best_gates(tmp_path, 0.5, 1) == ([[0.4]], 4)
    gates, step = best_gates(tmp_path, 0.5, 3)
    assert (gates[0][0], step) == (pytest.approx(0.3), 4)


def test_gates_of_a_sudden_collapse_are_not_chosen(tmp_path: Path) -> None:
    write(tmp_path, [0.9, 0.9, 0.9, 0.9, 0, 0, 0, 0])
    assert best_gates(tmp_path, 0.5, 1)[1] == 4


def test_a_run_that_ends_well_has_its_last_gates(tmp_path: Path) -> None:
    write(tmp_path, [1, 0.9, 0.8, 0.9, 0.45])
    assert best_gates(tmp_path, 0.5, 1)[1] == 5


def test_a_step_whose_gates_are_lost_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, [1, 1, 1])
    gates = tmp_path / "gates.jsonl"
    gates.write_bytes(gates.read_bytes()[:-9] + b"\xff")
    assert best_gates(tmp_path, 0.5, 1) == ([[0.2]], 2)


def test_no_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RlkvError, match="no step of training"):
        best_gates(tmp_path, 0.5, 1)


def test_no_good_step_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, [0.1, 0.2])
    with pytest.raises(RlkvError, match="below tau"):
        best_gates(tmp_path, 0.5, 1)
