"""Which rows speak for what is served: allocation, sink and window, type of the KV cache."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.allocation import allocate
from rlkv_vllm.allocation.span import Span
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.profile.budget import Budget, Verdict
from rlkv_vllm.profile.choice import ProfileChoice, budget_config, choose_profile
from rlkv_vllm.profile.evidence import Target, origin, rows_for, sparsity_within
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.profile.lookup import packaged_profiles
from rlkv_vllm.profile.schema import EvaluationRow
from tests.support.profiles import assert_one_line, make_profile, measured_row

UNEVEN = make_profile(gates=[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.0]])
BUDGET = Budget(0.01)
MEASURED = Budget(0.01, Verdict.MEASURED)


def profile_of(*rows: EvaluationRow, **changes: Any) -> HeadProfile:
    return UNEVEN.model_copy(update={"evaluation": list(rows), **changes})


def row(sparsity: float, lost: int = 0, **changes: Any) -> EvaluationRow:
    return measured_row(sparsity, lost, profile=UNEVEN, **changes)


def choose(
    tmp_path: Path, profile: HeadProfile, budget: Budget = BUDGET, **changes: Any
) -> ProfileChoice:
    save_profile(profile, tmp_path / "p.json")
    return choose_profile(str(tmp_path / "p.json"), budget=budget, **changes)


def refusal(
    tmp_path: Path, profile: HeadProfile, budget: Budget = BUDGET, **changes: Any
) -> tuple[str, list[str]]:
    """The line, and the words of the command in it."""
    with pytest.raises(RlkvError) as caught:
        choose(tmp_path, profile, budget, **changes)
    assert_one_line(caught.value, "--max-loss 1%")
    message = str(caught.value)
    return message, shlex.split(message.split("`")[1]) if "`" in message else []


def test_the_two_allocations_of_these_tests_differ() -> None:
    assert allocate(UNEVEN.gates, 0.5).full != allocate(UNEVEN.gates, 0.5, 2).full


# --- which rows count ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "target", "span", "counts"),
    [
        ({}, Target(), None, True),
        ({}, Target(2), None, False),
        ({"tp_size": 2}, Target(2), None, True),
        ({"tp_size": 2}, Target(), None, False),
        ({}, Target(), Span(16, 65), False),
        ({"span": (16, 65)}, Target(), Span(16, 65), True),
        ({"span": (16, 65)}, Target(), None, False),
        ({}, Target(kv_cache_dtype="fp8"), None, False),
        ({}, Target(kv_cache_dtype="auto"), None, True),
        ({}, Target(kv_cache_dtype="bfloat16"), None, True),
        ({"kv_cache_dtype": "fp8"}, Target(), None, False),
        ({"kv_cache_dtype": "fp8"}, Target(kv_cache_dtype="fp8_e4m3"), None, True),
        ({"kv_cache_dtype": "fp8_e5m2"}, Target(kv_cache_dtype="fp8"), None, False),
        ({"allocation": "0" * 64}, Target(), None, False),
        # Older files do not say: one rank, the profile's own sink and window.
        ({"allocation": None}, Target(), None, True),
        ({"allocation": None}, Target(2), None, False),
        ({"allocation": None}, Target(), Span(16, 65), False),
    ],
)
def test_a_row_counts_for_what_it_measured(
    made: dict[str, Any], target: Target, span: Span | None, counts: bool
) -> None:
    one = row(0.5, **made)
    assert rows_for(profile_of(one), target, span) == [one] * counts


def test_equal_heads_are_one_allocation_whatever_the_ranks() -> None:
    everything = row(1.0)
    assert rows_for(profile_of(everything), Target(2)) == [everything]
    full = row(0.0, span=(4, 4))
    assert rows_for(profile_of(full), Target(2), Span(1, 1)) == [full]


def test_what_rounds_to_the_full_cache_is_no_choice() -> None:
    profile = profile_of(row(0.01), row(0.0))
    assert allocate(UNEVEN.gates, 0.01).num_streaming == 0
    assert sparsity_within(profile, Budget(0.5, Verdict.MEASURED)) is None


def test_rows_of_older_files_give_way_to_newer_ones_of_their_task() -> None:
    old, other = row(0.5, allocation=None, temperature=0.0), row(0.5, allocation=None, task="b")
    new, elsewhere = row(0.5), row(0.5, tp_size=2)
    assert rows_for(profile_of(old, other, elsewhere)) == [old, other]
    assert rows_for(profile_of(old, other, new)) == [other, new]
    assert rows_for(profile_of(old, row(0.0))) == [old, row(0.0)]  # the full cache says nothing


def test_ranks_that_do_not_fit() -> None:
    with pytest.raises(RlkvError, match="--tp 3"):
        rows_for(profile_of(row(0.5)), Target(3))


def test_where_a_row_comes_from() -> None:
    profile, own = profile_of(), Span(16, 64)
    assert origin(profile, row(0.5)) == (1, own)
    assert origin(profile, row(0.5, tp_size=2)) == (2, own)
    assert origin(profile, row(1.0), Target(2)) == (2, own)
    assert origin(profile, row(0.5, span=(4, 16)), None, Span(4, 16)) == (1, Span(4, 16))
    assert origin(profile, row(0.5, allocation="0" * 64)) is None


# --- the choice ------------------------------------------------------------------------


def test_a_budget_chooses_the_largest_sparsity(tmp_path: Path) -> None:
    rows = [row(0.25), row(0.5), row(0.75, lost=12), row(0.5, tp_size=2, lost=300)]
    choice = choose(tmp_path, profile_of(*rows))
    assert choice.sparsity == 0.5
    assert choice.within is not None
    assert choice.within.verdict is Verdict.PROVEN
    assert choice.within.tasks == ["sums"]
    assert choose(tmp_path, profile_of(*rows), Budget(0.5)).sparsity == 0.75
    assert refusal(tmp_path, profile_of(*rows), target=Target(2))[0]


def test_the_recommended_sparsity_of_a_profile_is_no_evidence(tmp_path: Path) -> None:
    profile = profile_of(recommended_sparsity=0.5)
    assert "no evaluation rows" in refusal(tmp_path, profile)[0]


def test_measured_is_enough_where_it_is_asked_for(tmp_path: Path) -> None:
    profile = profile_of(row(0.5, lost=9))
    message, _ = refusal(tmp_path, profile)
    assert "sparsity 0.5 is measured: loses 0.9 points, at most 1." in message
    assert "n 1000, task sums" in message
    assert message.endswith("; --evidence measured serves sparsity 0.5")
    assert choose(tmp_path, profile, MEASURED).sparsity == 0.5


def test_old_rows_are_measured_and_never_proven(tmp_path: Path) -> None:
    profile = profile_of(row(0.5, allocation=None))
    assert choose(tmp_path, profile, MEASURED).within.verdict is Verdict.MEASURED  # type: ignore[union-attr]
    assert "sparsity 0.5 is measured" in refusal(tmp_path, profile)[0]


def test_the_weakest_task_speaks(tmp_path: Path) -> None:
    rows = [row(0.5), row(0.5, lost=2, task="hard"), row(0.5, task="easy")]
    within = choose(tmp_path, profile_of(*rows)).within
    assert within is not None
    assert within.weakest.row.task == "hard"
    assert within.tasks == ["easy", "hard", "sums"]
    text = within.describe()
    assert text.startswith("budget 1%, proven: loses 0.2 points, at most 0.")
    assert text.endswith("task hard and 2 more")


@pytest.mark.parametrize(
    ("rows", "how", "found", "flags"),
    [
        ([], {}, "it has no evaluation rows above sparsity 0", []),
        ([row(0.0)], {}, "it has no evaluation rows above sparsity 0", []),
        (
            [row(0.5)],
            {"target": Target(2)},
            "another allocation (that of --tensor-parallel-size 1)",
            ["--tensor-parallel-size", "2"],
        ),
        (
            [row(0.5, tp_size=2)],
            {},
            "another allocation (that of --tensor-parallel-size 2)",
            [],
        ),
        (
            [row(0.5)],
            {"target": Target(kv_cache_dtype="fp8")},
            "another KV cache type (that of the model)",
            ["--kv-cache-dtype", "fp8"],
        ),
        ([row(0.5, kv_cache_dtype="fp8")], {}, "another KV cache type (fp8)", []),
        (
            [row(0.5)],
            {"sink": 4, "window": 65},
            "another sink or window (--sink 16 --window 64)",
            ["--sink", "4", "--window", "65"],
        ),
        (
            [row(0.5, allocation="0" * 64)],
            {},
            "full heads, sink or window that this profile does not have",
            [],
        ),
        ([row(0.01)], {}, "sparsities that stream no head", []),
        (
            [row(0.25, lost=100), row(0.5)],
            {},
            "sparsity 0.25 is violated: loses 10.0 points, at most",
            [],
        ),
        ([row(0.5, n=100)], {}, "sparsity 0.5 is undecided: loses 0.0 points", []),
        (
            [row(0.25, task="a"), row(0.5, task="b")],
            {},
            "sparsity 0.5 holds on task b but was not measured on task a",
            [],
        ),
        (
            [row(0.25, task="a"), row(0.5, task="b", lost=100)],
            {},
            "sparsity 0.25 holds on task a but was not measured on task b",
            [],
        ),
    ],
)
def test_without_evidence_it_says_what_was_found_and_how_to_measure(
    tmp_path: Path, rows: list[EvaluationRow], how: dict[str, Any], found: str, flags: list[str]
) -> None:
    message, command = refusal(tmp_path, profile_of(*rows), **how)
    assert found in message
    path = str(tmp_path / "p.json")
    assert command == [
        *("rlkv", "eval", "MODEL", "--task", "TASK", "--profile", path),
        *("--max-loss", "1%", "--write-rows"),
        *flags,
    ]


def test_contradicting_rows_are_refused(tmp_path: Path) -> None:
    rows = [row(0.5, seed=1), row(0.5, seed=2, lost=300)]
    for budget in (BUDGET, MEASURED):
        assert "contradict each other" in refusal(tmp_path, profile_of(*rows), budget)[0]
    # Rows of different allocations do not.
    rows[1] = row(0.5, tp_size=2, lost=300)
    assert choose(tmp_path, profile_of(*rows)).sparsity == 0.5


def test_the_command_copies_a_profile_that_takes_no_rows() -> None:
    (name, path), *_ = packaged_profiles().items()
    with pytest.raises(RlkvError) as caught:
        choose_profile(name, budget=Budget(1e-5), target=Target(model=("embedded",)))
    assert_one_line(
        caught.value,
        f"`cp {path} my_profile.json && rlkv eval embedded --profile my_profile.json "
        "--max-loss 0.001% --write-rows --max-tokens 200`",
    )


def test_names_of_strangers_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a b; rm"
    folder.mkdir()
    message, command = refusal(folder, profile_of(row(0.5, n=100, task="x\x1b[31m")))
    assert str(folder / "p.json") in command
    assert r"task x\x1b[31m" in message


# --- the engine's configuration --------------------------------------------------------


def test_the_engine_chooses_again(tmp_path: Path) -> None:
    profile = profile_of(row(0.5))
    config = choose(tmp_path, profile, sink=None).engine_config()
    path = str(tmp_path / "p.json")
    assert config == {
        "profile": path,
        "max_loss": 0.01,
        "sink": 16,
        "window": 64,
        "sha256": profile.sha256(),
    }
    assert budget_config(path, BUDGET) == config
    # Another sparsity of the same profile, as evaluations and benchmarks start it.
    other = replace(choose(tmp_path, profile), sparsity=0.0).engine_config()
    assert (other["sparsity"], "max_loss" in other) == (0.0, False)
    measured = {**config, "evidence": "measured"}
    assert choose(tmp_path, profile, MEASURED).engine_config() == measured
    assert budget_config(path, MEASURED) == measured


def test_an_engine_that_is_not_known_yet_needs_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(profile_of(row(0.5, tp_size=2)), path)
    assert budget_config(str(path), BUDGET)["max_loss"] == 0.01
    save_profile(profile_of(row(0.0)), path)
    with pytest.raises(RlkvError, match="no evaluation rows"):
        budget_config(str(path), BUDGET)
    with pytest.raises(RlkvError, match="--window 0"):
        budget_config(str(path), BUDGET, window=0)
