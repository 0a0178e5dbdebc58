"""Which evaluation rows of a profile say something about what is served, and what they allow.

Evidence belongs to an allocation. Tensor parallelism gives every rank as many full heads, so the
same gates and sparsity serve other heads on other numbers of ranks.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.allocation.span import Span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.profile.budget import (
    MAX_LOSS,
    Assessment,
    Budget,
    Verdict,
    assess_rows,
    cache_dtype,
    conditions,
    largest_within,
    percent,
)
from rlkv_vllm.profile.lookup import is_own_file
from rlkv_vllm.profile.schema import EvaluationRow, HeadProfile


@dataclass(frozen=True)
class Target:
    """The engine that serves: what decides the answers beside profile, sparsity and span.

    `kv_cache_dtype` as vLLM names it; None: the model's own. `model` is how `rlkv eval` is given
    the model.
    """

    tp_size: int = 1
    kv_cache_dtype: str | None = None
    model: tuple[str, ...] = ("MODEL", "--task", "TASK")


@dataclass(frozen=True)
class Within:
    """A sparsity that is within a budget, and the rows that say so: one per task and sampling."""

    budget: Budget
    sparsity: float
    assessments: tuple[Assessment, ...]

    @property
    def weakest(self) -> Assessment:
        """The row with the lowest verdict, of several the one with the highest bound."""
        return min(self.assessments, key=lambda one: (one.verdict, -one.loss.high))

    @property
    def verdict(self) -> Verdict:
        return self.weakest.verdict

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that it was measured on."""
        return sorted({one.row.task for one in self.assessments})

    def describe(self) -> str:
        """In words: budget, verdict, loss, bound, problems, tasks."""
        others = len(self.tasks) - 1
        more = f" and {others} more" if others else ""
        return f"budget {percent(self.budget.max_loss)}, {self.weakest.describe()}{more}"


def rows_for(
    profile: HeadProfile, target: Target | None = None, span: Span | None = None
) -> list[EvaluationRow]:
    """The rows that were measured with what `target` serves; None: one rank, the profile's span.

    A row of an older file, which does not say what it measured, counts as one of a single rank
    with the sink and window of the profile, as long as no other row of its task counts.

    Raises:
        RlkvError: the ranks do not fit the heads.
    """
    target, span = target or Target(), span or _own_span(profile)

    def counts(row: EvaluationRow) -> bool:
        served = allocate(profile.gates, row.sparsity, target.tp_size)
        if row.sparsity and not served.num_streaming:  # rounded to the full cache
            return False
        is_same_type = cache_dtype(row.kv_cache_dtype) == cache_dtype(target.kv_cache_dtype)
        return is_same_type and _digest(profile, row) == served.digest(*span)

    rows = [row for row in profile.evaluation if counts(row)]
    replaced = {row.task for row in rows if row.allocation and row.sparsity}
    return [row for row in rows if row.allocation or row.task not in replaced]


def assess_profile(
    profile: HeadProfile,
    max_loss: float = MAX_LOSS,
    target: Target | None = None,
    span: Span | None = None,
) -> list[Assessment]:
    """Assessments of `rows_for`, as `assess_rows` merges them.

    Raises:
        RlkvError: as `rows_for`, or one row proves what another one disproves.
    """
    return assess_rows(rows_for(profile, target, span), max_loss)


def sparsity_within(
    profile: HeadProfile,
    budget: Budget,
    target: Target | None = None,
    span: Span | None = None,
) -> Within | None:
    """The largest sparsity that is within the budget on all tasks, with all smaller measured ones.

    None: there is none above 0. Arguments and errors as of `assess_profile`.
    """
    assessments = assess_profile(profile, budget.max_loss, target, span)
    best = largest_within(assessments, budget.evidence)
    if best is None:
        return None
    return Within(budget, best, tuple(one for one in assessments if one.row.sparsity == best))


def require_within(
    name: str,
    path: Path,
    profile: HeadProfile,
    budget: Budget,
    target: Target,
    span: Span,
) -> Within:
    """As `sparsity_within`, of the profile `name` that was read from `path`.

    Raises:
        RlkvError: there is no such sparsity; it says what was found, and the command that measures.
    """
    try:
        within = sparsity_within(profile, budget, target, span)
    except RlkvError as error:
        raise RlkvError(f"--max-loss {percent(budget.max_loss)}: {error}") from error
    if within is not None:
        return within
    hint = ""
    if budget.evidence is Verdict.PROVEN:
        measured = Budget(budget.max_loss, Verdict.MEASURED)
        if found := sparsity_within(profile, measured, target, span):
            hint = f"; --evidence measured serves sparsity {found.sparsity:g}"
    raise RlkvError(
        f"--max-loss {percent(budget.max_loss)}: no sparsity of profile {one_line(name)} is "
        f"{budget.evidence} to lose no more: {_found(profile, budget, target, span)}: measure with "
        f"`{evaluation_command(name, path, profile, budget, target, span)}`{hint}"
    )


def require_rows(name: str, path: Path, profile: HeadProfile, budget: Budget, span: Span) -> None:
    """Refuse a profile in which no budget finds a sparsity, whatever engine serves it."""
    if not any(row.sparsity for row in profile.evaluation):
        require_within(name, path, profile, budget, Target(), span)


def evaluation_command(
    name: str,
    path: Path,
    profile: HeadProfile,
    budget: Budget,
    target: Target,
    span: Span,
) -> str:
    """The command that measures what `target` serves, and writes the rows into the profile."""
    copy = []
    if not is_own_file(name, path):  # takes no rows
        copy, name = [shlex.join(["cp", str(path), "my_profile.json"]), "&&"], "my_profile.json"
    words = ["rlkv", "eval", *target.model, "--profile", name]
    words += ["--max-loss", percent(budget.max_loss), "--write-rows"]
    if target.tp_size > 1:
        words += ["--tensor-parallel-size", str(target.tp_size)]
    if target.kv_cache_dtype and cache_dtype(target.kv_cache_dtype):
        words += ["--kv-cache-dtype", target.kv_cache_dtype]
    limits = [row.max_tokens for row in profile.evaluation if row.max_tokens is not None]
    words += ["--max-tokens", str(limits[-1])] if limits else []
    own = _own_span(profile)
    words += ["--sink", str(span.sink)] if span.sink != own.sink else []
    words += ["--window", str(span.window)] if span.window != own.window else []
    return one_line(" ".join([*copy, shlex.join(words)]), 600)


def origin(
    profile: HeadProfile, row: EvaluationRow, target: Target | None = None, span: Span | None = None
) -> tuple[int, Span] | None:
    """Ranks and span that serve what `row` measured; None: other full heads, sink or window.

    `target` and `span` are tried first.
    """
    target, own = target or Target(), _own_span(profile)
    heads, digest = profile.model.num_kv_heads, _digest(profile, row)
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    for tp_size in dict.fromkeys([target.tp_size, *divisors]):
        allocation = allocate(profile.gates, row.sparsity, tp_size)
        for one in dict.fromkeys([span or own, own]):
            if allocation.digest(*one) == digest:
                return tp_size, one
    return None


def _own_span(profile: HeadProfile) -> Span:
    return Span(profile.sink, profile.window)


def _digest(profile: HeadProfile, row: EvaluationRow) -> str:
    return row.allocation or allocate(profile.gates, row.sparsity).digest(*_own_span(profile))


def _found(profile: HeadProfile, budget: Budget, target: Target, span: Span) -> str:
    """What a profile has instead of a sparsity that is within the budget."""
    rows = [row for row in profile.evaluation if row.sparsity]
    if not rows:
        return "it has no evaluation rows above sparsity 0"
    assessments = assess_profile(profile, budget.max_loss, target, span)
    sparsities = sorted({one.row.sparsity for one in assessments} - {0.0})
    if not sparsities:
        return "its rows are of " + " and ".join(_mismatches(profile, rows, target, span))
    every = {conditions(one.row): one.row for one in assessments if one.row.sparsity}
    incomplete = ""
    for sparsity in sparsities:
        here = [one for one in assessments if one.row.sparsity == sparsity]
        one = Within(budget, sparsity, tuple(here)).weakest
        if one.verdict < budget.evidence:
            return incomplete or f"sparsity {sparsity:g} is {one.describe()}"
        missing = every.keys() - {conditions(one.row) for one in here}
        names = sorted({one_line(every[key].task, 60) for key in missing})
        incomplete = (
            f"sparsity {sparsity:g} holds on {_tasks(here)} but was not measured on task "
            f"{', '.join(names)} with the sampling of its other rows"
        )
    return incomplete


def _tasks(assessments: Sequence[Assessment]) -> str:
    names = sorted({one_line(one.row.task, 60) for one in assessments})
    return f"task{'s' * (len(names) > 1)} {', '.join(names)}"


def _mismatches(
    profile: HeadProfile, rows: Sequence[EvaluationRow], target: Target, span: Span
) -> list[str]:
    """What the rows are of instead of what is served, each once."""
    found: dict[str, None] = {}
    for row in rows:
        if cache_dtype(row.kv_cache_dtype) != cache_dtype(target.kv_cache_dtype):
            name = row.kv_cache_dtype if cache_dtype(row.kv_cache_dtype) else None
            found[f"another KV cache type ({one_line(name or 'that of the model', 40)})"] = None
            continue
        known = origin(profile, row, target, span)
        if known is None:
            found["full heads, sink or window that this profile does not have"] = None
            continue
        tp_size, its_span = known
        if its_span != span:
            flags = f"--sink {its_span.sink} --window {its_span.window}"
            found[f"another sink or window ({flags})"] = None
        if tp_size != target.tp_size:
            found[f"another allocation (that of --tensor-parallel-size {tp_size})"] = None
    return list(found) or ["sparsities that stream no head"]
