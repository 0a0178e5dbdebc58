"""A refinement from beginning to end: problems, search, evaluation, head profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from rlkv_vllm.allocation.span import Span, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.hf.answers import Draw, HeadSplit, solve
from rlkv_vllm.hf.loading import load_model
from rlkv_vllm.models import load_model_fingerprint, model_source
from rlkv_vllm.options import RUN_FILE, save_options
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.profile.io import check_matches, save_profile
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.search.answers import Streaming, full_heads
from rlkv_vllm.search.config import RefineConfig
from rlkv_vllm.search.refine import refine_gates, streaming_counts
from rlkv_vllm.tasks import skip_note
from rlkv_vllm.training.curriculum import Processes, make_curriculum
from rlkv_vllm.training.report import write_report
from rlkv_vllm.training.result import (
    QUIET,
    Listener,
    evaluate_profile,
    explained_failures,
    make_profile,
)
from rlkv_vllm.training.run_folder import METRICS_FILE, PROFILE_FILE, REFINE_FILE


def run(
    config: RefineConfig, *, resume: bool = False, listener: Listener = QUIET
) -> HeadProfile | None:
    """Refine a head profile.

    Under `accelerate launch` every process calls this; the main one evaluates and writes.

    Args:
        config: the job.
        resume: continue what `config.output` holds.
        listener: told about progress.

    Returns:
        The profile, on the main process; None on others.

    Raises:
        RlkvError: if the job cannot be done, with what to change; what was reached stays in
            `config.output`.
    """
    with explained_failures(config.output):
        return _run(config, resume, listener)


def _run(config: RefineConfig, resume: bool, listener: Listener) -> HeadProfile | None:
    output, wanted = config.output, config.search
    # What can be refused is refused before the model is loaded.
    given, _ = find_profile(config.profile)
    check_matches(given, load_model_fingerprint(model_source(config.model), config.revision))
    streaming_counts(wanted.sparsities, given.model.num_layers * given.model.num_kv_heads)
    span = resolve_span(config.sink, config.window, Span(given.sink, given.window))
    _check_output(output, resume)
    task = config.task.load()
    if note := skip_note(task):
        listener.say(note)
    output.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.cuda.is_available())
    rank, world = state.process_index, state.num_processes
    model, tokenizer, fingerprint = load_model(
        config.model, config.revision, config.dtype, state.device
    )
    if rank == 0:
        save_options(config, output / RUN_FILE, "The options of the refinement.")
    names = {"temperature", "top_p", "top_k"}
    draw = None if config.sampling.is_greedy else config.sampling.model_dump(include=names)
    settings = {
        "model": fingerprint.model_dump(mode="json"),
        "task": config.task.model_dump(mode="json"),
    }
    curriculum = make_curriculum(
        model,
        tokenizer,
        task,
        output,
        settings=settings,
        n=config.tried,
        keep=2 * wanted.problems,
        sampling=config.sampling.model_copy(update={"seed": config.seed}),
        batch_size=config.batch_size,
        processes=Processes.of_accelerate(),
        report=lambda done, total: listener.report("curriculum", done, total),
    )
    listener.curriculum(curriculum)

    def evaluate(which: Sequence[int], streaming: Sequence[Streaming], seed: int) -> list[bool]:
        mine = range(rank, len(which), world)
        correct: list[bool] = []
        if mine:  # the last few answers may be fewer than processes
            correct = solve(
                model,
                tokenizer,
                task,
                [curriculum.problems[which[i]] for i in mine],
                split=[
                    HeadSplit(
                        full_heads(streaming[i], fingerprint.num_layers, fingerprint.num_kv_heads),
                        *span,
                    )
                    for i in mine
                ],
                max_new_tokens=config.sampling.max_tokens,
                batch_size=config.batch_size,
                draw=Draw(**draw) if draw else None,
                seed=(seed + rank) % 2**31,
            ).correct
        found = gather_object(list(zip(mine, correct, strict=True)))
        return [is_solved for _, is_solved in sorted(found)]

    gates, result = refine_gates(
        given.gates,
        evaluate,
        len(curriculum.problems),
        wanted,
        output / REFINE_FILE,
        seed=config.seed,
        chunk=config.batch_size * world,
        settings={
            **settings,
            "curriculum": curriculum.sha256,
            "span": span,
            "sampling": config.sampling.model_dump(),
        },
        is_writer=rank == 0,
        report=lambda done, total: listener.report("search", done, total),
    )
    if rank != 0:
        return None
    end = "the found heads are taken" if result["is_taken"] else "the gates are kept"
    listener.say(f"search: {result['answers']} answers, {end} (p {result['p']:.2g})")
    made = given.provenance
    profile = make_profile(
        fingerprint,
        gates,
        span,
        task,
        curriculum,
        method=f"{made.method}+refine",
        source=made.source,
        seed=config.seed,
        settings=config.model_dump(mode="json", exclude={"output", "evaluation"})
        | {"sink": span.sink, "window": span.window}
        | {name: result[name] for name in ("p", "is_taken", "answers")}
        | {
            # Where a local file lies is nobody else's business.
            "profile": config.profile.rpartition("/")[2],
            "start": {"sha256": given.sha256(), "config": made.config},
        },
    )
    save_profile(profile, output / PROFILE_FILE)
    profile = evaluate_profile(
        profile,
        model,
        tokenizer,
        task,
        curriculum.problems,
        config.evaluation,
        output,
        seed=config.seed + 1,
        max_new_tokens=config.sampling.max_tokens,
        report=listener.report,
    )
    write_report(output)
    return profile


def _check_output(output: Path, resume: bool) -> None:
    if output.exists() and not output.is_dir():
        raise RlkvError(f"--output {output}: is a file: give a folder")
    if (output / METRICS_FILE).exists():
        raise RlkvError(
            f"--output {output}: holds a run of `rlkv train`: choose another folder for "
            "`rlkv refine`"
        )
    if not resume and any((output / name).exists() for name in (RUN_FILE, REFINE_FILE)):
        raise RlkvError(
            f"--output {output}: holds an earlier run: give --resume to continue it, or choose "
            "another folder"
        )
