"""Profile jobs on the embedded model: a few tiny steps each."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("trl")

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import load_profile
from rlkv_vllm.training import job
from rlkv_vllm.training.checkpoints import last_checkpoint
from rlkv_vllm.training.config import TrainConfig, make_config
from rlkv_vllm.training.job import run
from rlkv_vllm.training.run import Listener
from rlkv_vllm.training.trainer import RlkvTrainer
from tests.support.profiles import assert_one_line


def config(output: Path, **trainer: Any) -> TrainConfig:
    options = {
        "max_steps": 4,
        "learning_rate": 0.05,
        "reg": 0.02,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 150,
        "gradient_checkpointing": False,
        "save_steps": 2,
    }
    return make_config(
        {
            "output": str(output),
            "task": {"name": "hops"},
            "curriculum": {"problems": 8, "greedy": True},
            "evaluation": {"problems": 4, "sparsities": [0.2]},
            "trainer": options | trainer,
        },
        "test",
    )


def rows(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    run(config(output))
    return output


def test_a_run_leaves_profile_report_and_logs(finished: Path) -> None:
    profile = load_profile(finished / "profile.json")
    assert profile.provenance.method == "rlkv"
    assert [row.sparsity for row in profile.evaluation] == [0.0, 0.2]
    assert {(row.temperature, row.seed) for row in profile.evaluation} == {
        (1, profile.provenance.seed + 1)
    }
    assert profile.gates == rows(finished, "gates.jsonl")[-1]["gates"]
    assert all(0 <= gate <= 1 for layer in profile.gates for gate in layer)
    assert min(min(layer) for layer in profile.gates) < 1
    assert [row["step"] for row in rows(finished, "metrics.jsonl")] == [1, 2, 3, 4]
    report = (finished / "report.html").read_text()
    assert "data:image" in report or "<svg" in report
    assert "rlkv" in report
    assert list((finished / "tensorboard").rglob("events.out.*"))
    assert not list(finished.rglob("*model*.safetensors")), "weights are not saved"


def test_a_finished_run_is_only_evaluated_again(finished: Path) -> None:
    before = (finished / "gates.jsonl").read_bytes()
    said: list[str] = []
    run(config(finished), resume=True, listener=Listener(say=said.append))
    assert "training is finished" in said
    assert (finished / "gates.jsonl").read_bytes() == before


def test_resuming_with_another_window_is_refused(finished: Path) -> None:
    with pytest.raises(RlkvError, match="was made with window None, now 8"):
        run(config(finished).model_copy(update={"window": 8}), resume=True)


def test_a_curriculum_smaller_than_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RlkvError, match="problems are kept, a step needs 16"):
        run(config(tmp_path / "run", per_device_train_batch_size=32))


def test_only_gates_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Watched(RlkvTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            before = {name: w.detach().clone() for name, w in self.model.named_parameters()}
            result = super().train(*args, **kwargs)
            after = dict(self.model.named_parameters())
            seen["changed"] = [n for n, w in before.items() if not torch.equal(w, after[n])]
            seen["optimised"] = sum(len(g["params"]) for g in self.optimizer.param_groups)
            return result

    monkeypatch.setattr(job, "RlkvTrainer", Watched)
    run(config(tmp_path / "run", max_steps=2, weight_decay=0.1))
    assert len(seen["changed"]) == 5
    assert all(name.endswith("rlkv_gate") for name in seen["changed"])
    assert seen["optimised"] == 5


def test_advantages_over_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means = []

    class Watched(RlkvTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            tokens = output["completion_mask"].sum(1)
            means.append(((tokens * output["advantages"]).sum() / tokens.sum()).item())
            return output

    monkeypatch.setattr(job, "RlkvTrainer", Watched)
    profile = run(config(tmp_path / "run", max_steps=2, advantage="batch", temperature=1.5))
    assert means == pytest.approx([0, 0], abs=1e-6)
    assert profile is not None
    assert profile.provenance.config["trainer"]["advantage"] == "batch"
    with pytest.raises(RlkvError, match=r"trainer: advantage batch: .* leave out scale_rewards"):
        run(config(tmp_path / "other", advantage="batch", scale_rewards="group"))


def test_a_killed_run_resumes_on_the_same_curve(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"

    def die(row: dict[str, Any], total: int) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config(output), listener=Listener(on_step=die))
    # As if the kill had come while the next checkpoint was written.
    (output / "checkpoint-4").mkdir()
    (output / "checkpoint-4" / "gates.safetensors").write_bytes(b"half")
    assert last_checkpoint(output) == output / "checkpoint-2"
    with pytest.raises(RlkvError, match="give --resume to continue"):
        run(config(output))
    run(config(output), resume=True)
    assert rows(output, "gates.jsonl") == rows(finished, "gates.jsonl")
    ours = [row["reward"] for row in rows(output, "metrics.jsonl")]
    assert ours == [row["reward"] for row in rows(finished, "metrics.jsonl")]


def test_a_run_resumes_from_its_newest_whole_checkpoint(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "finished.json").unlink()
    (output / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    said: list[str] = []
    run(config(output), resume=True, listener=Listener(say=said.append))
    assert said[1:3] == [
        "checkpoint-4 is not used: optimizer.pt is empty",
        "resuming from checkpoint-2",
    ]
    assert rows(output, "gates.jsonl") == rows(finished, "gates.jsonl")
    assert last_checkpoint(output) == output / "checkpoint-4", "written anew"
    (output / "finished.json").unlink()
    for folder in output.glob("checkpoint-*"):
        state = folder / "trainer_state.json"
        state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(RlkvError) as caught:
        run(config(output), resume=True)
    assert_one_line(caught.value, str(output), "checkpoint-2: trainer_state.json is cut off")


#: `rlkv train` that ends by SIGKILL, inside step 3 or inside the file of the optimizer of step 4.
DIES = """
import os, signal, sys
import torch
from rlkv_vllm.cli import main
from rlkv_vllm.training.trainer import RlkvTrainer

where, loss, save = sys.argv.pop(1), RlkvTrainer._compute_loss, torch.save

def loss_or_die(self, *args):
    if where == "step" and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, *args)

def save_or_die(content, file, *args, **options):
    save(content, file, *args, **options)
    if where == "checkpoint" and str(file).endswith("checkpoint-4/optimizer.pt"):
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

RlkvTrainer._compute_loss, torch.save = loss_or_die, save_or_die
main()
"""


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_run_resumes_after_kill_9(finished: Path, tmp_path: Path, where: str) -> None:
    options, job_file = config(tmp_path / "run"), tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(options.model_dump(mode="json")))
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-c", DIES, where, "train", str(job_file), *threads]
    ended = subprocess.run(command, capture_output=True, timeout=600, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert b"\nstep 2/4: reward 1.00, loss " in ended.stderr
    assert b"\r" not in ended.stderr, "no bars"
    output = options.output
    assert len(rows(output, "metrics.jsonl")) == (2 if where == "step" else 4)
    said: list[str] = []
    profile = run(options, resume=True, listener=Listener(say=said.append))
    assert "resuming from checkpoint-2" in said
    if where == "checkpoint":
        assert "checkpoint-4 is not used: it was not written to its end" in said
    assert rows(output, "gates.jsonl") == rows(finished, "gates.jsonl")
    assert profile is not None
    undisturbed = load_profile(finished / "profile.json")
    assert (profile.gates, profile.evaluation) == (undisturbed.gates, undisturbed.evaluation)


@pytest.mark.parametrize(
    "full_at", ["optimizer.pt", "gates.safetensors", "metrics.jsonl", "profile.json"]
)
def test_a_full_disk_stops_a_run_that_resumes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    """Simulated where the three ways of writing end: torch's, ours, and a log."""
    output = tmp_path / "run"
    full = OSError(errno.ENOSPC, "No space left on device")

    def is_full(path: Any) -> bool:
        return Path(path).name.endswith(full_at) and last_checkpoint(output) is not None

    plain_save, plain_open, plain_fdopen = torch.save, Path.open, os.open

    def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if is_full(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
        plain_save(content, file, *args, **kwargs)

    def open_log(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "a" and is_full(self):
            with plain_open(self, mode, *args, **kwargs) as file:
                file.write('{"step": 3, "rew')
            raise full
        return plain_open(self, mode, *args, **kwargs)

    def open_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_EXCL and is_full(str(path)[: -len(".0123456789ab.tmp")]):
            raise full
        return plain_fdopen(path, flags, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", save)
        patched.setattr(Path, "open", open_log)
        patched.setattr(os, "open", open_file)
        with pytest.raises(
            RlkvError, match=r"--output .*free space\?\) and continue with --resume"
        ):
            run(config(output))
    step = 4 if full_at == "profile.json" else 2
    assert last_checkpoint(output) == output / f"checkpoint-{step}"
    assert not list(output.rglob("*.tmp"))
    assert not (output / "profile.json").exists()
    run(config(output), resume=True)
    assert rows(output, "gates.jsonl") == rows(finished, "gates.jsonl")


#: A run on a disk of 100 kB that gets more space later; ends with the run in the folder `saved`.
SMALL_DISK = """
set -e
mount -t tmpfs -o size=100k none run
"$1" -m rlkv_vllm train job.yaml 2> full.txt && exit 9
mount -o remount,size=10m run
"$1" -m rlkv_vllm train job.yaml --resume 2> resumed.txt
cp -r run saved
"""


def test_a_disk_that_is_really_full_stops_a_run_that_resumes(
    finished: Path, tmp_path: Path
) -> None:
    unshare = ["unshare", "-rm"]
    may = ["sh", "-c", " ".join([*unshare, "mount -t tmpfs none /mnt"])]
    if subprocess.run(may, capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    (tmp_path / "run").mkdir()
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(config(tmp_path / "run").model_dump(mode="json")))
    command = [*unshare, "sh", "-c", SMALL_DISK, "sh", sys.executable]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=900, check=True)
    *_, error = (tmp_path / "full.txt").read_text().splitlines()
    assert error.startswith(f"rlkv: error: --output {tmp_path / 'run'}: cannot be written")
    assert error.endswith("continue with --resume")
    saved = tmp_path / "saved"
    assert not list(saved.rglob("*.tmp"))
    assert rows(saved, "gates.jsonl") == rows(finished, "gates.jsonl")
    assert (
        load_profile(saved / "profile.json").gates == load_profile(finished / "profile.json").gates
    )


def test_two_processes_share_a_run(tmp_path: Path) -> None:
    job_file = tmp_path / "job.yaml"
    options = config(tmp_path / "run", max_steps=2, per_device_train_batch_size=2)
    job_file.write_text(yaml.safe_dump(options.model_dump(mode="json")))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "rlkv_vllm",
            "train",
            str(job_file),
        ],
        check=True,
        timeout=600,
        capture_output=True,
    )
    output = tmp_path / "run"
    assert json.loads((output / "curriculum.json").read_text())["tried"] == 8
    assert [row["step"] for row in rows(output, "metrics.jsonl")] == [1, 2]
    assert len(list((output / "checkpoint-2").glob("rng_state_*.pth"))) == 2
    profile = load_profile(output / "profile.json")
    assert profile.gates == rows(output, "gates.jsonl")[-1]["gates"]


def test_a_run_of_before_rlkv_refine_resumes(finished: Path, tmp_path: Path) -> None:
    """Its run.yaml has a section `refine`, its curriculum no format."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    run_file, summary = output / "run.yaml", output / "curriculum.json"
    content = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump({**content, "refine": {"enabled": False, "reach": 10}}))
    figures = json.loads(summary.read_text())
    del figures["format"]
    summary.write_text(json.dumps(figures))
    said: list[str] = []
    run(config(output), resume=True, listener=Listener(say=said.append))
    assert "training is finished" in said
    run_file.write_text(yaml.safe_dump({**content, "refine": {"enabled": True}}))
    with pytest.raises(RlkvError, match=r"`rlkv refine OUTPUT/profile\.json`"):
        run(config(output), resume=True)


def test_a_collapsed_run_stops_and_keeps_the_last_good_gates(tmp_path: Path) -> None:
    said: list[str] = []
    # At this temperature answers are noise.
    with pytest.raises(RlkvError, match="below tau"):
        run(
            config(
                tmp_path / "run", temperature=50.0, collapse_steps=2, max_completion_length=8
            ).model_copy(
                update={
                    "curriculum": config(tmp_path).curriculum.model_copy(
                        update={"max_new_tokens": 150}
                    )
                }
            ),
            listener=Listener(say=said.append),
        )
    assert any("stopped: the reward was below tau 0.5 for 2 steps" in line for line in said)


def test_a_window_that_covers_everything_is_refused(tmp_path: Path) -> None:
    wide = config(tmp_path / "run").model_copy(update={"window": 2000})
    with pytest.raises(RlkvError, match=r"cover every sample \(the longest has \d+ tokens\)"):
        run(wide)


def test_a_failing_reward_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def broken(completion, answer, **_):\n    raise KeyError('oops')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = config(tmp_path / "run")
    task = asked.task.model_copy(update={"reward": "my_rewards:broken"})
    with pytest.raises(RlkvError, match=r"my_rewards:broken.*KeyError"):
        run(asked.model_copy(update={"task": task}))


def test_an_impossible_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RlkvError, match=r"trainer: .*num_generations"):
        run(config(tmp_path / "run", num_generations=3))
