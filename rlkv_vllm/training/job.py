"""A profile job from beginning to end: curriculum, gate training, evaluation, head profile."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlkv_vllm.answers import Sampling
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.by_mask import Report, fresh_problems, measure_gates
from rlkv_vllm.evaluation.rows import with_rows
from rlkv_vllm.files import one_line, read_json_object, write_text_atomic
from rlkv_vllm.hf.answers import HeadSplit, solve
from rlkv_vllm.hf.gated_attention import attach_gates
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.profile import HeadProfile, ModelFingerprint, Provenance
from rlkv_vllm.profile.io import check_matches, load_profile, save_profile
from rlkv_vllm.rollouts.protocol import Rollouts
from rlkv_vllm.search.refine import REFINE_FILE, refine_gates
from rlkv_vllm.search.search import Streaming, full_heads
from rlkv_vllm.tasks import Task, get_task, skip_note
from rlkv_vllm.training.config import (
    RUN_FILE,
    TrainConfig,
    job_versions,
    load_config,
    save_run,
)
from rlkv_vllm.training.curriculum import Curriculum, Share, make_curriculum
from rlkv_vllm.training.report import write_report
from rlkv_vllm.training.run_log import METRICS_FILE, OnStep, RunLog, best_gates
from rlkv_vllm.training.trainer import RlkvConfig, RlkvTrainer, last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROFILE_FILE, FINISHED_FILE = "profile.json", "finished.json"
SOURCE = "arXiv:2510.08525 (RLKV)"


@dataclass(frozen=True)
class Listener:
    """What a job tells while it runs.

    Attributes:
        report: (stage, work done, work in all).
        on_step: figures of a training step.
        say: a line of text.
    """

    report: Report = lambda stage, done, total: None
    on_step: OnStep = lambda row, total: None
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class _Made:
    """Gates and where they come from.

    Attributes:
        gates: ``[layers][KV heads]``.
        method: for the provenance.
        source: the paper.
        step: of the training that they are from; None if another profile has them.
    """

    gates: list[list[float]]
    method: str
    source: str | None
    step: int | None = None


def run(
    config: TrainConfig,
    *,
    resume: bool = False,
    listener: Listener = Listener(),
    rollouts: Rollouts | None = None,
) -> HeadProfile | None:
    """Make a head profile by reinforcement learning.

    Under `accelerate launch` every process calls this; the main one evaluates and writes.

    Args:
        config: the job.
        resume: continue what `config.output` holds.
        listener: told about progress.
        rollouts: the engine of `config.rollout`; None: transformers' generate.

    Returns:
        The profile, on the main process; None on others.

    Raises:
        RlkvError: if the job cannot be done, with what to change; what was reached stays in
            `config.output`.
    """
    try:
        return _run(config, resume, listener, rollouts)
    except (OSError, RuntimeError, RlkvError) as error:
        reason = _failed_file(error)
        if reason is None:
            raise
        raise RlkvError(
            f"--output {config.output}: cannot be written or read ({one_line(reason)}): mend that "
            "(free space?) and continue with --resume"
        ) from error


def _failed_file(error: BaseException) -> str | None:
    """What went wrong with a file, if that is what `error` is about."""
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, RlkvError):  # of our own writing; others say how to mend themselves
        cause = error.__cause__
        is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        return str(cause) if is_full else None
    # `torch.save` has no type of its own for it.
    is_save = any(part in str(error) for part in ("inline_container", "PytorchStreamWriter"))
    return f"a checkpoint is cut off: {error}" if is_save else None


def _run(
    config: TrainConfig, resume: bool, listener: Listener, rollouts: Rollouts | None
) -> HeadProfile | None:
    output = config.output
    if output.exists() and not output.is_dir():
        raise RlkvError(f"--output {output}: is a file: give a folder")
    logs = (output / METRICS_FILE, output / REFINE_FILE)
    if not resume and (last_checkpoint(output) or any(log.exists() for log in logs)):
        raise RlkvError(
            f"--output {output}: holds an earlier run: give --resume to continue it, or choose "
            "another folder"
        )
    task = get_task(
        config.task.name,
        prompt_column=config.task.prompt_column,
        answer_column=config.task.answer_column,
        split=config.task.split,
        reward=config.task.reward,
    )
    if note := skip_note(task):
        listener.say(note)
    output.mkdir(parents=True, exist_ok=True)
    args = _trainer_args(config)
    is_main = args.process_index == 0
    model, tokenizer, fingerprint = load_model(
        config.model, config.revision, config.dtype, args.device
    )
    sink, window = config.span
    if resume and (output / RUN_FILE).exists():
        _require_same_run(config, load_config(output / RUN_FILE))
    if is_main:
        save_run(config, output / RUN_FILE)
    curriculum = _curriculum(config, args, model, tokenizer, fingerprint, task, listener)
    listener.say(
        f"curriculum: {len(curriculum.problems)} of {curriculum.tried} problems kept, answers of "
        f"{curriculum.mean_tokens:.0f} tokens on average, {curriculum.capped_share:.0%} cut off"
    )
    if sink + window >= curriculum.longest:
        raise RlkvError(
            f"sink {sink} + window {window} cover every sample (the longest has "
            f"{curriculum.longest} tokens): streaming heads would lose nothing and gates get no "
            "signal: lower window"
        )
    if config.refine.start is None:
        is_sharded = _train(
            config, args, model, tokenizer, task, curriculum, resume, listener, rollouts
        )
        PartialState().wait_for_everyone()  # the main process writes the log
        gates, step = best_gates(output, args.tau, args.average_steps)
        made = _Made(gates, "rlkv", SOURCE, step)
    else:
        is_sharded = False
        given = load_profile(config.refine.start)
        check_matches(given, fingerprint)
        made = _Made(given.gates, given.provenance.method, given.provenance.source)
    if config.refine.enabled:
        gates = _refine(config, args, model, tokenizer, task, curriculum, made.gates, listener)
        made = replace(made, gates=gates, method=f"{made.method}+refine")
    if not is_main:
        return None
    profile = _profile(config, args, fingerprint, task, curriculum, made)
    save_profile(profile, output / PROFILE_FILE)
    if is_sharded:
        listener.say("not evaluated: the model is sharded; use `rlkv eval --write-rows`")
    else:
        profile = _evaluate(config, model, tokenizer, task, curriculum, profile, listener)
    write_report(output)
    return profile


def _train(
    config: TrainConfig,
    args: RlkvConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
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
    with attach_gates(model, *config.span) as gates:
        log = RunLog(output, gates, args.tau, args.collapse_steps, listener.on_step)
        trainer = RlkvTrainer(
            gates,
            task,
            args,
            curriculum.problems,
            tokenizer,
            rollouts=rollouts,
            staleness=config.rollout.staleness,
        )
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded and config.refine.enabled:
            raise RlkvError(
                "refine.enabled: a sharded model cannot write answers with full heads of their "
                "own: train without, and refine the profile on one process with refine.start"
            )
        # First, so that TensorBoard and others see what it adds.
        trainer.callback_handler.callbacks.insert(0, log)
        checkpoint = last_checkpoint(output) if resume else None
        finished = output / FINISHED_FILE
        # transformers takes one more step when it resumes a run that is at its end.
        if resume and finished.exists() and _read_finished(finished) == config.trainer:
            listener.say("training is finished")
        else:
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
    return is_sharded


def _require_same_run(config: TrainConfig, made: TrainConfig) -> None:
    for name in ("model", "revision", "dtype", "seed", "sink", "window"):
        ours, theirs = getattr(config, name), getattr(made, name)
        if ours != theirs:
            raise RlkvError(
                f"--resume: {config.output / RUN_FILE} was made with {name} {theirs}, now {ours}: "
                "resume with the same, or choose another --output"
            )


def _read_finished(path: Path) -> Any:
    """The trainer options with which the run in this folder came to its end."""
    return json.loads(path.read_text(encoding="utf-8")).get("trainer")


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


def _sampling(config: TrainConfig, args: RlkvConfig, max_tokens: int | None) -> Sampling:
    """Of answers where gates are not trained."""
    return Sampling(
        max_tokens=max_tokens or args.max_completion_length,
        temperature=0 if config.curriculum.greedy else args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
    )


def _curriculum(
    config: TrainConfig,
    args: RlkvConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: ModelFingerprint,
    task: Task,
    listener: Listener,
) -> Curriculum:
    wanted = config.curriculum
    sampling = _sampling(config, args, wanted.max_new_tokens)
    names = {"temperature", "top_p", "top_k"}
    settings = {
        "model": fingerprint.model_dump(mode="json"),
        "task": config.task.model_dump(mode="json"),
        "draw": None if sampling.is_greedy else sampling.model_dump(include=names),
        "max_new_tokens": sampling.max_tokens,
        "batch_size": wanted.batch_size,
    }
    share = Share(args.process_index, args.world_size, PartialState().wait_for_everyone)
    return make_curriculum(
        model,
        tokenizer,
        task,
        config.output,
        settings=settings,
        n=wanted.problems,
        keep=wanted.keep,
        sampling=sampling.model_copy(update={"seed": config.seed}),
        batch_size=wanted.batch_size,
        share=share,
        report=lambda done, total: listener.report("curriculum", done, total),
    )


def _refine(
    config: TrainConfig,
    args: RlkvConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    curriculum: Curriculum,
    gates: list[list[float]],
    listener: Listener,
) -> list[list[float]]:
    """Refine on the problems of the curriculum, with sink and window as served."""
    wanted = config.refine
    sink, window = config.serving_span
    rank, world = args.process_index, args.world_size
    sampling = _sampling(config, args, wanted.max_new_tokens)

    def judge(which: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        mine = range(rank, len(which), world)
        correct: list[bool] = []
        if mine:  # the last few answers may be fewer than processes
            correct = solve(
                model,
                tokenizer,
                task,
                [curriculum.problems[which[i]] for i in mine],
                split=[
                    HeadSplit(full_heads(streaming[i], len(gates), len(gates[0])), sink, window)
                    for i in mine
                ],
                sampling=sampling.model_copy(update={"seed": seed + rank}),
                batch_size=wanted.batch_size,
            ).correct
        found = gather_object(list(zip(mine, correct, strict=True)))
        return [right for _, right in sorted(found)]

    refined = refine_gates(
        gates,
        judge,
        len(curriculum.problems),
        wanted,
        config.output / REFINE_FILE,
        seed=config.seed,
        chunk=wanted.batch_size * world,
        writes=rank == 0,
        report=lambda done, total: listener.report("refinement", done, total),
    )
    if rank == 0:
        result = read_json_object(config.output / REFINE_FILE)["result"]
        end = "the found heads are taken" if result["is_taken"] else "the gates are kept"
        listener.say(f"refinement: {result['answers']} answers, {end} (p {result['p']:.2g})")
    return refined


def _profile(
    config: TrainConfig,
    args: RlkvConfig,
    fingerprint: ModelFingerprint,
    task: Task,
    curriculum: Curriculum,
    made: _Made,
) -> HeadProfile:
    sink, window = config.serving_span
    settings = config.model_dump(mode="json", exclude={"output", "evaluation"})
    # Where a local copy lies is nobody else's business.
    settings |= {"model": fingerprint.id, "task": {**settings["task"], "name": task.name}}
    train_sink, train_window = config.span
    settings |= {"sink": train_sink, "window": train_window, "step": made.step}
    if config.refine.start is not None:
        settings["refine"]["start"] = config.refine.start.name
    settings["trainer"] |= {
        name: getattr(args, name)
        for name in ("learning_rate", "reg", "tau", "weight_decay", "temperature", "loss_type")
    }
    return HeadProfile(
        model=fingerprint,
        gates=made.gates,
        sink=sink,
        window=window,
        provenance=Provenance(
            method=made.method,
            source=made.source,
            config=settings,
            seed=config.seed,
            versions=job_versions(),
            created=date.today(),
            data=f"{len(curriculum.problems)} problems of task {task.name} (seed {config.seed}) "
            f"that the model solves, of {curriculum.tried} (sha256 {curriculum.sha256[:16]})",
        ),
    )


def _evaluate(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    curriculum: Curriculum,
    profile: HeadProfile,
    listener: Listener,
) -> HeadProfile:
    """The profile with rows, written again after each of them."""
    wanted = config.evaluation
    problems = fresh_problems(
        task,
        wanted.problems,
        config.seed + 1,
        curriculum.problems,
        "curriculum.problems or evaluation.problems",
    )
    if not problems:
        return profile
    limit = wanted.max_new_tokens or config.trainer.get("max_completion_length")
    for row in measure_gates(
        model,
        tokenizer,
        task,
        problems,
        profile.gates,
        sink=profile.sink,
        window=profile.window,
        sparsities=wanted.sparsities,
        max_new_tokens=int(limit) if isinstance(limit, int) else RlkvConfig.max_completion_length,
        batch_size=wanted.batch_size,
        seed=config.seed + 1,
        report=listener.report,
    ):
        profile = with_rows(profile, [row])
        save_profile(profile, config.output / PROFILE_FILE)
    return profile
