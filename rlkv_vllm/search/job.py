"""A refinement from beginning to end: problems, search, evaluation, head profile."""

from __future__ import annotations

import torch
from accelerate import PartialState

from rlkv_vllm.allocation.span import Span, resolve_span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import choose_sampling, load_model_fingerprint, model_source
from rlkv_vllm.options import RUN_FILE
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.profile.io import check_matches
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.search.config import RefineConfig
from rlkv_vllm.search.model import SplitModel
from rlkv_vllm.search.refine import refine_gates, streaming_counts
from rlkv_vllm.training.run import QUIET, Listener, Run, check_output, explained_failures
from rlkv_vllm.training.run_folder import METRICS_FILE, REFINE_FILE


@explained_failures
def run(
    config: RefineConfig, *, resume: bool = False, listener: Listener = QUIET
) -> HeadProfile | None:
    """Refine a head profile.

    Under `accelerate launch` every process calls this; the main one evaluates, writes, and gets
    the profile.

    Raises:
        RlkvError: if the job cannot be done, with what to change; what was reached stays in
            `config.output`.
    """
    output, wanted = config.output, config.search
    # What can be refused is refused before the model is loaded.
    given, _ = find_profile(config.profile)
    check_matches(given, load_model_fingerprint(model_source(config.model), config.revision))
    streaming_counts(wanted.sparsities, given.model.num_layers * given.model.num_kv_heads)
    span = resolve_span(config.sink, config.window, Span(given.sink, given.window))
    if (output / METRICS_FILE).exists():
        raise RlkvError(
            f"--output {output}: holds a run of `rlkv train`: choose another folder for "
            "`rlkv refine`"
        )
    check_output(output, resume, (RUN_FILE, REFINE_FILE))
    asked = config.sampling.model_dump(exclude={"max_tokens"})
    sampling, why = choose_sampling(
        config.model,
        asked,
        max_tokens=config.sampling.max_tokens,
        revision=config.revision,
        prefix="sampling.",
    )
    config.evaluation.sampling(sampling, config.seed + 1)  # refused now, if it is
    state = PartialState(cpu=not torch.cuda.is_available())
    job = Run(config, listener, state.device)
    listener.say(f"sampling: {sampling.describe()} ({why})")
    rank, world = state.process_index, state.num_processes
    solver = job.solver
    curriculum = job.curriculum(config.tried, 2 * wanted.problems, sampling, config.batch_size)
    model = SplitModel(
        solver,
        curriculum.problems,
        span,
        sampling=sampling.model_copy(update={"seed": config.seed}),
        batch_size=config.batch_size,
        processes=state,
        report=listener.report,
    )
    gates, result = refine_gates(
        given.gates,
        model,
        len(curriculum.problems),
        wanted,
        output / REFINE_FILE,
        seed=config.seed,
        chunk=config.batch_size * world,
        settings={
            **solver.settings,
            "curriculum": curriculum.sha256,
            "span": span,
            "sampling": sampling.model_dump(),
        },
        is_writer=rank == 0,
        report=listener.report,
    )
    if rank != 0:
        return None
    end = "the found heads are taken" if result["is_taken"] else "the gates are kept"
    listener.say(f"search: {result['answers']} answers, {end} (p {result['p']:.2g})")
    made = given.provenance
    settings = {
        "profile": config.profile.rpartition("/")[2],  # not where it lies
        "start": {"sha256": given.sha256(), "method": made.method, "config": made.config},
        **span._asdict(),
        **{name: result[name] for name in ("p", "is_taken", "answers")},
    }
    return job.finish(
        gates,
        span,
        curriculum,
        f"{made.method}+refine",
        made.source,
        settings,
        sampling=sampling,
    )
