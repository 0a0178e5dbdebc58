"""The one way to make an engine with a split cache, or one in gated mode.

`rlkv serve`, `rlkv eval`, `rlkv bench`, rollouts, tests and the public API take the engine's
classes from here, and the check that every worker's cache is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlkv_vllm.engine.config import CONFIG_KEY, GATED, SplitConfig, SplitPlan, split_plan
from rlkv_vllm.engine.gated.live import get_gates
from rlkv_vllm.engine.report import SplitReport
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.options import validate
from rlkv_vllm.profile.budget import asked_budget
from rlkv_vllm.profile.choice import budget_config, choose_profile

if TYPE_CHECKING:
    from pathlib import Path

    from vllm import LLM
    from vllm.engine.protocol import EngineClient

WORKER_EXTENSION = "rlkv_vllm.engine.worker_extension.RlkvWorkerExtension"
SCHEDULER = "rlkv_vllm.engine.cache.scheduler.SplitScheduler"
CPU_WORKER = "rlkv_vllm.engine.cpu.worker.SplitCPUWorker"

#: vLLM's 128 tokens are longer than many prompts: their answers would not share a cache.
GATED_CPU_BLOCK_SIZE = 32

REPORT_METHOD = "rlkv_split_report"
_REPORT_TIMEOUT_S = 60.0


def split(
    profile: str | Path,
    sparsity: float | None = None,
    *,
    max_loss: float | str | None = None,
    evidence: str | None = None,
    sink: int | None = None,
    window: int | None = None,
    retention_interval: int | None = None,
    additional_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and of vLLM's `EngineArgs` for a split cache.

    ``LLM(model, **split("profile.json", sparsity=0.5))`` is the engine that `rlkv serve` makes.
    The profile is read and checked now; whether it fits the model, and what its evaluation rows say
    about the engine's ranks and KV cache type, is checked by the engine before weights are loaded.

    Args:
        profile: a file, a packaged name, or ``org/repo[@revision][:file]`` on the Hugging Face hub.
        sparsity: share of streaming KV heads, 0 to 1; None: what the profile recommends.
        max_loss: accuracy that may be lost against the full cache, such as 0.01 or "1%". The
            profile's evaluation rows then choose the sparsity; not together with `sparsity`.
        evidence: what the rows must show with `max_loss`: "proven" (the default: the 95% bound of
            the loss is within) or "measured" (the estimate is, over at least 200 problems).
        sink: first tokens that streaming heads keep; None: the profile's.
        window: last tokens that streaming heads keep; None: the profile's.
        retention_interval: prompt tokens between two places at which another prompt with the same
            beginning can resume from the prefix cache; 0 for none, None for the default.
        additional_config: further entries of vLLM's ``additional_config``.

    Raises:
        RlkvError: no such profile, it is not valid, has no evaluation rows although `max_loss` is
            given, or a value is out of range.
    """
    budget = asked_budget(max_loss, evidence, sparsity)
    if budget is not None:
        config = budget_config(str(profile), budget, sink=sink, window=window)
    else:
        config = choose_profile(str(profile), sparsity, sink=sink, window=window).engine_config()
    if retention_interval is not None:
        config["retention_interval"] = retention_interval
    validate(SplitConfig, config, "split()", "help(rlkv_vllm.split)")
    return engine_options(config, additional_config)


def engine_options(
    config: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a split cache or gated mode.

    ``config`` becomes ``additional_config["rlkv"]``, an entry that the others must not have.
    """
    from vllm.platforms import current_platform

    others = dict(additional_config or {})
    if CONFIG_KEY in others:
        raise RlkvError(
            f"additional_config has an entry '{CONFIG_KEY}' of its own: remove it, the profile and "
            "its options make it"
        )
    options: dict[str, Any] = {
        "additional_config": others | {CONFIG_KEY: dict(config)},
        "worker_extension_cls": WORKER_EXTENSION,
    }
    if current_platform.is_cpu():
        options["worker_cls"] = CPU_WORKER
    if config.get("mode") != GATED:
        return options | {"scheduler_cls": SCHEDULER}  # counts the blocks of each kind of head
    options["logprobs_mode"] = "processed_logprobs"  # as sampled, which trainers need
    if current_platform.is_cpu():
        options["block_size"] = GATED_CPU_BLOCK_SIZE
    return options


def start(model: str, config: Mapping[str, Any] | None, **options: Any) -> LLM:
    """An engine, proven to be split or to have gates; None as ``config``: stock vLLM.

    ``options`` win over those of `engine_options`.

    Raises:
        RlkvError: the cache is not split as configured, or the engine has no gates.
    """
    from vllm import LLM

    if config is None:
        return LLM(model, **options)
    llm = LLM(model, **(engine_options(config) | options))
    try:
        if config.get("mode") == GATED:
            get_gates(llm)
        else:
            prove(llm)
    except BaseException:
        llm.llm_engine.engine_core.shutdown()
        raise
    return llm


@contextmanager
def started(model: str, config: Mapping[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """As `start`; the engine is shut down when the block ends."""
    llm = start(model, config, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def prove(llm: LLM) -> list[SplitReport]:
    """Ask every worker what it built, and compare that with the plan.

    vLLM only logs a plugin that fails to load, and goes on with full caches.

    Args:
        llm: an engine made with `split`.

    Returns:
        A report per worker.

    Raises:
        RlkvError: a worker cannot answer, keeps full caches, or built another split.
    """
    plan = split_plan(llm.llm_engine.vllm_config)
    if plan is None:
        raise _not_split(f"additional_config has no entry '{CONFIG_KEY}' with a profile")
    with _no_report_is_no_proof():
        answers = llm.collective_rpc(REPORT_METHOD, timeout=_REPORT_TIMEOUT_S)
    return check_reports(answers, plan)


async def prove_async(engine_client: EngineClient, plan: SplitPlan) -> list[SplitReport]:
    """As `prove`, of a server's engine."""
    with _no_report_is_no_proof():
        answers = await engine_client.collective_rpc(REPORT_METHOD, timeout=_REPORT_TIMEOUT_S)
    return check_reports(answers, plan)


@contextmanager
def _no_report_is_no_proof() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, nothing is proven
        why = one_line(error) or type(error).__name__
        raise _not_split(f"no report from the workers: {why}") from error


def check_reports(answers: Sequence[dict[str, Any]], plan: SplitPlan) -> list[SplitReport]:
    """Compare what the workers answered with the plan; raises as `prove`."""
    tp_size = plan.groups.allocation.tp_size
    if sorted(answer.get("rank", -1) for answer in answers) != list(range(tp_size)):
        raise _not_split(f"{len(answers)} of {tp_size} workers answered")
    return [_checked(answer, plan) for answer in answers]


def _checked(answer: dict[str, Any], plan: SplitPlan) -> SplitReport:
    worker = f"worker {answer['rank']}"
    if not answer["active"]:
        unsplit = answer["unsplit_layers"]
        why = (
            f"{len(unsplit)} attention layers keep full caches, e.g. {unsplit[0]}"
            if unsplit
            else f"it has {answer['full_head_caches']} full and "
            f"{answer['streaming_head_caches']} streaming head caches"
        )
        raise _not_split(f"{worker}: {why}")
    report = SplitReport.from_dict(answer)
    expected = SplitReport.of(plan, answer["rank"], report.num_blocks)
    for what in _MUST_AGREE:
        built, planned = getattr(report, what), getattr(expected, what)
        if built != planned:
            raise _not_split(f"{worker} has {what} {built}, expected {planned}")
    return report


_MUST_AGREE = (
    "profile_sha256",
    "sparsity",
    "full_heads",
    "streaming_heads",
    "sink",
    "window",
    "block_size",
)


def _not_split(why: str) -> RlkvError:
    return RlkvError(
        f"the KV cache is not split ({why}): run `rlkv doctor`, and see that nothing removes "
        "'rlkv' from VLLM_PLUGINS"
    )
