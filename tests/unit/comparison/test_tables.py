"""Figures of a comparison and its report, from planted answers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlkv_vllm.comparison.record import Record
from rlkv_vllm.comparison.report import findings, markdown, summary, write_report
from rlkv_vllm.comparison.tables import Comparison, tables
from rlkv_vllm.statistics import sign_flip_p, sign_test_p, tango_bounds, wilson_interval
from rlkv_vllm.tasks.measurement import Measurement

N = 200
FULL = "f" * 64
SAMPLING = {"max_tokens": 50, "temperature": 0.0}


def bits(share: float, seed: int = 0) -> list[bool]:
    """Exactly that share of the problems is solved."""
    found = [place < round(share * N) for place in range(N)]
    random.Random(seed).shuffle(found)
    return found


def measured(correct: Sequence[bool], samples: int = 1) -> Measurement:
    """Solved answers have 10 tokens, the others 50, cut off."""
    lengths = [10 if right else 50 for right in correct]
    return Measurement(correct, lengths, [not right for right in correct], samples=samples)


def planted(
    path: Path,
    answers: Mapping[str, Mapping[int | None, Sequence[bool]]],
    *,
    samples: int = 1,
    heads: Mapping[tuple[str, int | None], list[list[int]]] | None = None,
    **changes: Any,
) -> Record:
    """A record of these answers by method and seed, at sparsity .5; the full cache solves all."""
    settings = {"task": "sums", "n": N, "samples": samples, "problem_seed": 9}
    model = {
        "model": {"id": "org/m", "num_layers": 2, "num_kv_heads": 2},
        "sampling": SAMPLING,
        "full_cache": FULL,
        "device": "cpu",
    }
    record = Record(
        path / "compare.json",
        settings,
        {"m": model},
        asked={
            "models": ["m"],
            "methods": list(answers),
            "reference": next(iter(answers)),
            "seeds": [0, 1, 2],
            "sparsities": [0.5],
        },
        command="rlkv compare m",
        machine={
            "cpu": "C", "cores": 2, "threads": 1, "platform": "P", "python": "3", "versions": {},
        },
    )  # fmt: skip
    record.add("m", FULL, measured([True] * N * samples, samples))
    runs = []
    for method, by_seed in answers.items():
        for seed, correct in by_seed.items():
            digest = f"{method}-{seed}"
            record.add("m", digest, measured(correct, samples))
            runs.append(
                {
                    "method": method,
                    "seed": seed,
                    "seen": [],
                    "cpu_seconds": None if seed is None else 10.0 + seed,
                    "seconds": None,
                    "full_heads": {"0.5": (heads or {}).get((method, seed), [[0], [1]])},
                    "digests": {"0.5": digest},
                    **changes,
                }
            )
    record.set_runs("m", runs)
    return record


def compared(record: Record) -> list[Comparison]:
    ((panel,),) = (model.panels for model in tables(record.content))
    return [*panel.comparisons]


def test_one_profile_each(tmp_path: Path) -> None:
    good, bad = bits(0.9), bits(0.8, 1)
    record = planted(tmp_path, {"good": {0: good}, "bad": {0: bad}})
    ((panel,),) = (model.panels for model in tables(record.content))
    assert [row.method for row in panel.rows] == ["full cache", "good", "bad"]
    row = panel.rows[2]
    assert (row.accuracy, row.by_seed) == (0.8, [0.8])
    assert row.interval == pytest.approx(wilson_interval(160, 200))
    assert row.mean_output_tokens == pytest.approx(0.8 * 10 + 0.2 * 50)
    assert row.capped_share == pytest.approx(0.2)
    assert row.agreement is None
    (one,) = panel.comparisons
    gained = sum(a and not b for a, b in zip(good, bad, strict=True))
    lost = sum(b and not a for a, b in zip(good, bad, strict=True))
    assert one.difference == pytest.approx((gained - lost) / N)
    assert (one.low, one.high) == pytest.approx(tango_bounds(gained, lost, N, 0.05, 0.5))
    assert one.p == pytest.approx(sign_test_p(good, bad, "two-sided"))
    assert one.outcome == "win"


def test_seeds_that_end_alike_say_no_more_than_one(tmp_path: Path) -> None:
    good, bad = bits(0.9), bits(0.8, 1)
    (one,) = compared(planted(tmp_path / "1", {"good": {0: good}, "bad": {0: bad}}))
    thrice = {"good": dict.fromkeys((0, 1, 2), good), "bad": dict.fromkeys((0, 1, 2), bad)}
    record = planted(tmp_path / "3", thrice)
    (three,) = compared(record)
    assert (three.difference, three.p, three.seeds) == (one.difference, pytest.approx(one.p), 3)
    assert (three.low, three.high) == pytest.approx((one.low, one.high))
    rows = tables(record.content)[0].panels[0].rows
    assert rows[1].interval == pytest.approx(wilson_interval(180, 200), abs=1e-3)
    assert rows[1].agreement == 1.0


def test_seeds_are_paired_and_problems_are_clusters(tmp_path: Path) -> None:
    ours = {seed: bits(0.85, seed) for seed in range(3)}
    theirs = {seed: bits(0.8, 10 + seed) for seed in (1, 2)}
    (one,) = compared(planted(tmp_path, {"ours": ours, "theirs": theirs}))
    assert one.seeds == 2, "seed 0 has no partner"
    sums = [sum(ours[seed][place] - theirs[seed][place] for seed in (1, 2)) for place in range(N)]
    assert one.difference == pytest.approx(sum(sums) / (2 * N))
    assert one.p == pytest.approx(sign_flip_p(sums))
    independent = tango_bounds(
        sum(a and not b for seed in (1, 2) for a, b in zip(ours[seed], theirs[seed], strict=True)),
        sum(b and not a for seed in (1, 2) for a, b in zip(ours[seed], theirs[seed], strict=True)),
        2 * N,
    )
    assert one.low <= independent[0] < one.difference < independent[1] <= one.high


def test_one_file_for_all_seeds_is_paired_with_each(tmp_path: Path) -> None:
    theirs = {seed: bits(0.8, seed) for seed in range(3)}
    for name, answers in (
        ("1", {"ours": {None: bits(0.9, 9)}, "theirs": theirs}),
        ("2", {"ours": theirs, "theirs": {None: bits(0.9, 9)}}),
    ):
        (one,) = compared(planted(tmp_path / name, answers))
        assert one.seeds == 3
        assert abs(one.difference) == pytest.approx(0.1)
    nothing = {"ours": {0: bits(0.9)}, "theirs": {1: bits(0.8)}}
    assert compared(planted(tmp_path / "3", nothing)) == []


def test_several_answers_to_a_problem(tmp_path: Path) -> None:
    always = [bit for bit in bits(0.9) for _ in range(3)]
    never = [bit for bit in bits(0.8, 1) for _ in range(3)]
    record = planted(tmp_path, {"good": {0: always}, "bad": {0: never}}, samples=3)
    (one,) = compared(record)
    (single,) = compared(
        planted(tmp_path / "1", {"good": {0: bits(0.9)}, "bad": {0: bits(0.8, 1)}})
    )
    assert (one.low, one.high) == pytest.approx((single.low, single.high))
    assert tables(record.content)[0].n == N


def test_agreement_of_full_heads(tmp_path: Path) -> None:
    heads = {("a", 0): [[0, 1], []], ("a", 1): [[0], [1]], ("a", 2): [[0, 1], []]}
    record = planted(tmp_path, {"a": {s: bits(0.9) for s in range(3)}}, heads=heads)
    assert tables(record.content)[0].panels[0].rows[1].agreement == pytest.approx(2 / 3)


def test_the_report_says_what_the_numbers_say(tmp_path: Path) -> None:
    answers = {
        "ours": {seed: bits(0.9, seed) for seed in range(3)},
        "worse": {seed: bits(0.7, 5 + seed) for seed in range(3)},
        "alike": {seed: bits(0.9, seed) for seed in range(3)},
        "better": {None: bits(1.0)},
    }
    record = planted(tmp_path, answers)
    found = tables(record.content)
    (sentence,) = findings(found, "ours")
    win, rest = sentence.split("; no difference is shown to ")
    tie, loss = rest.split("; `ours` solves fewer than ")
    assert win.startswith("m at sparsity 0.5: `ours` solves more than `worse` (+20.0 points, ")
    assert tie.startswith("`alike` (+0.0 points, at least")
    assert loss.startswith("`better` (-10.0 points, at most -")
    text = markdown(record, found)
    assert "rlkv compare m\n" in text
    assert "| `ours` | 0.900 (0.900 0.900 0.900) |" in text
    assert "| `better` | 1.000 |" in text
    assert "| `worse` | +20.0 |" in text
    assert "| `ours` | 11 (10-12) | - |" in text
    assert "| `better` | - | - |" in text
    assert "200 fresh problems." in text
    assert text.count("|---") == text.count("---|") > 0
    assert [path.name for path in write_report(record, tmp_path)] == ["report.md", "report.png"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert summary(found)[2][:4] == ("m", "0.5", "worse", "0.700 (0.700 0.700 0.700)")
    assert summary(found)[2][-1].startswith("+20.0 (p ")


def test_without_answers_there_is_no_report(tmp_path: Path) -> None:
    record = planted(tmp_path, {"a": {0: bits(0.9)}})
    record.content["models"]["m"]["answers"].clear()
    assert write_report(record, tmp_path) == []
    assert not (tmp_path / "report.md").exists()
