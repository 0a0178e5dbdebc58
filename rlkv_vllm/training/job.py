"""A training job from beginning to end: curriculum, gate training, evaluation, head profile."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line, read_json_object, write_text_atomic
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.options import RUN_FILE
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.rollouts.protocol import Rollouts
from rlkv_vllm.training.checkpoints import last_checkpoint
from rlkv_vllm.training.config import TrainConfig, load_config
from rlkv_vllm.training.curriculum import Curriculum
from rlkv_vllm.training.run import QUIET, Listener, Run, check_output, explained_failures
from rlkv_vllm.training.run_folder import METRICS_FILE, REFINE_FILE
from rlkv_vllm.training.run_log import RunLog, best_gates
from rlkv_vllm.training.solver import Solver
from rlkv_vllm.training.trainer import RlkvConfig, RlkvTrainer

FINISHED_FILE = "finished.json"
SOURCE = "arXiv:2510.08525 (RLKV)"


@explained_failures
def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    listener: Listener = QUIET,
    rollouts: Rollouts | None = None,
) -> HeadProfile | None:
    """Make a head profile by reinforcement learning.

    Under `accelerate launch` every process calls this; the main one evaluates, writes, and gets
    the profile. `rollouts` is the engine of `config.rollout`; None: transformers' generate.

    Raises:
        RlkvError: if the job cannot be done, with what to change; what was reached stays in
            `config.output`.
    """
    output = config.output
    checkpoints = [folder.name for folder in output.glob("checkpoint-*")]
    check_output(output, resume, [METRICS_FILE, REFINE_FILE, *checkpoints])
    if resume and (output / RUN_FILE).exists():
        _require_same_run(config, load_config(output / RUN_FILE))
    args = _trainer_args(config)
    sampling = Sampling(
        max_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
    )
    config.evaluation.sampling(sampling, config.seed + 1)  # refused now, if it is
    job = Run(config, listener, args.device)
    wanted = config.curriculum
    trying = sampling.model_copy(
        update={"max_tokens": wanted.max_new_tokens or args.max_completion_length}
    )
    if wanted.greedy:
        trying = trying.model_copy(update={"temperature": 0.0})
    curriculum = job.curriculum(wanted.problems, wanted.keep, trying, wanted.batch_size)
    sink, window = config.span
    if sink + window >= curriculum.longest:
        raise RlkvError(
            f"sink {sink} + window {window} cover every sample (the longest has "
            f"{curriculum.longest} tokens): streaming heads would lose nothing and gates get no "
            "signal: lower window"
        )
    is_sharded = _train(config, args, job.solver, curriculum, resume, listener, rollouts)
    job.processes.wait_for_everyone()  # the main process writes the log
    gates, step = best_gates(output, args.tau, args.average_steps)
    if not job.processes.is_main_process:
        return None
    if is_sharded:
        listener.say("not evaluated: the model is sharded; use `rlkv eval --write-rows`")
    names = (
        "learning_rate",
        "reg",
        "tau",
        "weight_decay",
        "temperature",
        "loss_type",
        "advantage",
    )
    trainer = config.trainer | {name: getattr(args, name) for name in names}
    return job.finish(
        gates,
        config.serving_span,
        curriculum,
        "rlkv",
        SOURCE,
        {"sink": sink, "window": window, "step": step, "trainer": trainer},
        sampling=sampling,
        is_evaluated=not is_sharded,
    )


def _train(
    config: TrainConfig,
    args: RlkvConfig,
    solver: Solver,
    curriculum: Curriculum,
    resume: bool,
    listener: Listener,
    rollouts: Rollouts | None,
) -> bool:
    """Train the gates, into the logs of the run; returns whether the model is sharded now."""
    output = config.output
    needed = (args.generation_batch_size or 1) // args.num_generations
    if len(curriculum.problems) < needed:
        raise RlkvError(
            f"curriculum: {len(curriculum.problems)} problems are kept, a step needs {needed}: "
            "raise curriculum.problems, or lower trainer.per_device_train_batch_size or "
            "trainer.gradient_accumulation_steps"
        )
    with attach_gates(solver.model, *config.span) as gates:
        log = RunLog(output, gates, args.tau, args.collapse_steps, listener.on_step)
        trainer = RlkvTrainer(
            gates,
            solver.task,
            args,
            curriculum.problems,
            solver.tokenizer,
            rollouts=rollouts,
            staleness=config.rollout.staleness,
        )
        # First, so that TensorBoard and others see what it adds.
        trainer.callback_handler.callbacks.insert(0, log)
        finished = output / FINISHED_FILE
        # transformers takes one more step when it resumes a run that is at its end.
        is_finished = resume and finished.exists()
        if is_finished and read_json_object(finished).get("trainer") == config.trainer:
            listener.say("training is finished")
        else:
            checkpoint = last_checkpoint(output, listener.say) if resume else None
            if checkpoint is not None:
                listener.say(f"resuming from {checkpoint.name}")
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if args.process_index == 0:
                write_text_atomic(finished, json.dumps({"trainer": config.trainer}) + "\n")
    if log.collapsed_at is not None:
        listener.say(
            f"stopped: the reward was below tau {args.tau} for {args.collapse_steps} steps, up to "
            f"step {log.collapsed_at}. The profile has the last gates before that; lower "
            "trainer.reg or trainer.learning_rate for a full run"
        )
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _require_same_run(config: TrainConfig, made: TrainConfig) -> None:
    for name in ("model", "revision", "dtype", "seed", "sink", "window"):
        ours, theirs = getattr(config, name), getattr(made, name)
        if ours != theirs:
            raise RlkvError(
                f"--resume: {config.output / RUN_FILE} was made with {name} {theirs}, now {ours}: "
                "resume with the same, or choose another --output"
            )


def _trainer_args(config: TrainConfig) -> RlkvConfig:
    on_gpu = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.output / "tensorboard")
    options: dict[str, Any] = {
        "bf16": on_gpu and config.dtype in ("auto", "bfloat16"),
        "fp16": on_gpu and config.dtype == "float16",
        "use_cpu": not on_gpu,
        "save_steps": 10,
        "save_total_limit": 2,
        "ddp_timeout": 24 * 3600,  # processes wait for the slowest one's curriculum
        **config.trainer,
        "output_dir": str(config.output),
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
    }
    try:
        args = RlkvConfig(**options)
    except (ValueError, TypeError) as error:
        raise RlkvError(f"trainer: {one_line(error)}") from error
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs are for a launcher: DataParallel would share one mask
    return args
