"""An evaluation within a budget in words: what it needs, and what it found."""

from __future__ import annotations

from collections.abc import Sequence

from rlkv_vllm.evaluation.looks import (
    FEW_CHANGE,
    MANY_CHANGE,
    Schedule,
    problems_for_length,
    problems_needed,
)
from rlkv_vllm.profile.budget import Assessment, Verdict, largest_within
from rlkv_vllm.tasks.measurement import Measurement


def announce(plan: Schedule, wanted: int) -> list[str]:
    """Before it starts: the problems that the bound needs, and those there are of the `wanted`."""
    level = plan.looks[-1].level
    few, many = (
        problems_needed(plan.max_loss, changed, level=level)
        for changed in (FEW_CHANGE, MANY_CHANGE)
    )
    lines = [
        f"a loss of at most {100 * plan.max_loss:g}% needs about {few:,} problems if "
        f"{FEW_CHANGE:.0%} of the answers change against the full cache, {many:,} if "
        f"{MANY_CHANGE:.0%} do; {plan.problems:,} are planned, each sparsity stops as soon as it "
        "is decided"
    ]
    if plan.problems < wanted:
        lines.append(f"the task has {plan.problems:,} problems, not {wanted:,}: all are asked")
    if plan.problems < plan.first_proof:
        lines.append(
            f"{plan.problems:,} problems can prove nothing: {plan.first_proof:,} are the least, if "
            "no answer changes"
        )
    return lines


def length_note(full: Measurement, max_tokens: int, plan: Schedule) -> str | None:
    """Once the full cache has answered: that the planned problems cannot prove the length."""
    if not plan.stops or not full.mean_output_tokens:
        return None
    mean = full.mean_output_tokens
    needed = problems_for_length(mean, max_tokens, plan.looks[-1].level)
    if needed <= plan.problems:
        return None
    return (
        f"answers have {mean:.0f} tokens on average and may have {max_tokens:,}: to prove that "
        f"they get no longer takes {needed:,} problems or more; a lower --max-tokens needs fewer"
    )


def conclude(label: str, assessments: Sequence[Assessment], max_loss: float) -> str:
    """Afterwards: the sparsity of a profile that is within the budget, and what is missing."""
    proven = largest_within(assessments, Verdict.PROVEN)
    measured = largest_within(assessments, Verdict.MEASURED)
    held = [f"sparsity {proven:g} is proven"] if proven else []
    if measured and measured != proven:
        held.append(f"{'' if held else 'sparsity '}{measured:g} is measured, not proven")
    text = f"{label}, a loss of at most {100 * max_loss:g}%: "
    text += ", ".join(held) if held else "no sparsity is proven or measured"
    ordered = sorted(assessments, key=lambda one: one.row.sparsity)
    missing = next((one for one in ordered if one.verdict < Verdict.PROVEN), None)
    if missing is not None:
        text += f"; {missing.row.sparsity:g} is {missing.describe()}"
        if missing.verdict is not Verdict.VIOLATED:
            text += ": more problems (--n) may prove it"
    return text


def is_undecided(assessments: Sequence[Assessment]) -> bool:
    """Whether more problems may decide the smallest sparsity that is not measured to hold."""
    missing = [one for one in assessments if one.verdict < Verdict.MEASURED]
    first = min(missing, key=lambda one: one.row.sparsity, default=None)
    return first is not None and first.verdict is Verdict.UNDECIDED
