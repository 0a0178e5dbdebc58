"""``rlkv train``: make a head profile by reinforcement learning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlkv_vllm.cli.progress import Resume, StageProgress, Threads, print_result, require_packages


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the job, or a run.yaml.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run, over the file's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Over the file's.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value over the file's, e.g. trainer.max_steps=20."),
    ] = None,
    resume: Resume = False,
    threads: Threads = None,
) -> None:
    """Find the heads that reasoning needs: GRPO on one gate per KV head (arXiv 2510.08525).

    Writes run.yaml, curriculum, checkpoints, TensorBoard logs, report.html and profile.json to
    the output folder. On several GPUs: accelerate launch -m rlkv_vllm train CONFIG.
    """
    import json
    import warnings

    require_packages("rlkv train", "trl", "datasets", "accelerate")
    # Only its own vLLM rollouts would be concerned: ours do not go through them.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    from rlkv_vllm.training.config import load_config

    changes = list(overrides or [])
    if output is not None:
        changes.append(f"output={json.dumps(str(output))}")
    if seed is not None:
        changes.append(f"seed={seed}")
    job = load_config(config, changes)

    from rlkv_vllm.rollouts import open_rollouts
    from rlkv_vllm.training.job import run
    from rlkv_vllm.training.run import QUIET, Listener
    from rlkv_vllm.training.trainer import RlkvConfig

    with StageProgress(threads) as progress:

        def on_step(row: dict[str, Any], total: int) -> None:
            left = row["elapsed"] / row["step"] * (total - row["step"]) / 60
            state = (
                f"reward {row['reward']:.2f}, loss {row['loss']:.4f}, gates "
                f"{row['gate_mean']:.2f}, {row['output_tokens']:.0f} tokens, "
                f"{row['seconds']:.1f} s"
            )
            if progress.is_plain:
                progress.say(f"step {row['step']}/{total}: {state}, {left:.1f} min left")
            else:
                progress.report("training", row["step"], total, state)

        is_main = progress.is_main
        listener = Listener(progress.report, on_step, progress.say) if is_main else QUIET
        if job.rollout.engine != "transformers":
            listener.say(f"rollouts by {job.rollout.engine}")
        engine = open_rollouts(job.rollout, job.model, job.revision, job.dtype, job.span)
        with engine as rollouts:
            profile = run(job, resume=resume, listener=listener, rollouts=rollouts)
        tokens = job.trainer.get("max_completion_length", RlkvConfig.max_completion_length)
        print_result(profile, job, tokens)
