"""Figures of the JSON routes, against the forecast they come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import EvaluationRow
from rlkv_vllm.profile.budget import Budget, Verdict
from rlkv_vllm.profile.evidence import sparsity_within
from rlkv_vllm.serving.status import ByKind, CacheFigures, split_status
from tests.support.plans import BLOCK, BLOCKS, LENGTH, make_plan
from tests.support.profiles import measured_row


@pytest.mark.parametrize("tp_size", [1, 2])
def test_bytes_are_those_of_all_workers(tp_size: int) -> None:
    plan = make_plan(tp_size)
    figures = CacheFigures(plan, BLOCKS)
    page = plan.geometry.page_bytes
    pages = sum(plan.groups.pages_per_block(rank) for rank in range(tp_size))
    assert figures.block_bytes == pages * page
    assert figures.capacity_bytes == (BLOCKS - 1) * pages * page
    # A full cache of the same model is the same however it is spread.
    assert figures.full_cache_block_bytes == 4 * 2 * page


def test_use_is_blocks_times_bytes() -> None:
    figures = CacheFigures(make_plan(), BLOCKS)
    use = figures.use(ByKind(full=30, streaming=4), 30, requests_running=2)
    assert use.bytes == ByKind(full=30 * figures.block_bytes, streaming=4 * figures.block_bytes)
    assert use.full_cache_bytes == 30 * figures.full_cache_block_bytes
    assert use.saved_bytes == use.full_cache_bytes - 34 * figures.block_bytes
    assert use.requests_running == 2


def test_forecast_agrees_with_the_engines() -> None:
    plan = make_plan()
    told = CacheFigures(plan, BLOCKS).forecast(300, 5)
    need = plan.forecast.bytes_per_request(300, 0)
    assert told.split.bytes == 5 * told.split.bytes_per_request == 5 * need
    assert told.full.bytes_per_request == plan.forecast.stock_bytes_per_request(300)
    assert told.split.requests_at_once == plan.forecast.requests_in(BLOCKS, 300)
    assert told.saved_bytes == told.full.bytes - told.split.bytes > 0
    assert told.ratio == pytest.approx(told.split.bytes / told.full.bytes)


def test_forecast_says_whether_all_fit() -> None:
    figures = CacheFigures(make_plan(), BLOCKS)
    most = figures.requests_possible(LENGTH).split
    assert figures.forecast(None, most).fits
    assert not figures.forecast(None, most + 1).fits
    assert most > figures.requests_possible(LENGTH).full


def test_a_request_longer_than_the_longest_is_refused() -> None:
    with pytest.raises(RlkvError, match=f"tokens={LENGTH + 1}: .* {LENGTH} tokens"):
        CacheFigures(make_plan(), BLOCKS).forecast(LENGTH + 1, 1)


def test_status_says_what_the_budget_rests_on() -> None:
    plan = make_plan()
    assert split_status(CacheFigures(plan, BLOCKS), ["a"], "?").accuracy_budget is None
    rows = [measured_row(0.5, lost=4), measured_row(0.5, lost=0, task="easy")]
    for row, verdict in ((rows[0], "proven"), (without_pairs(rows[0]), "measured")):
        profile = plan.profile.model_copy(update={"evaluation": [row, rows[1]]})
        within = sparsity_within(profile, Budget(0.02, Verdict.MEASURED))
        figures = CacheFigures(replace(plan, within=within), BLOCKS)
        told = split_status(figures, ["a"], "?").accuracy_budget
        assert told is not None
        assert (told.max_loss, told.verdict, told.n) == (0.02, verdict, 1000)
        assert told.tasks == ["easy", "sums"]
        assert told.loss == pytest.approx(0.004)
        if verdict == "proven":
            assert told.loss_bound is not None
            assert told.loss < told.loss_bound <= 0.02
        else:
            assert told.loss_bound is None
        assert "null" in told.model_dump_json() or verdict == "proven"


def without_pairs(row: EvaluationRow) -> EvaluationRow:
    return row.model_copy(update={"paired": None})


def test_status_counts_heads_by_layer() -> None:
    status = split_status(CacheFigures(make_plan(), BLOCKS), ["a", "b"], "?")
    assert sum(status.heads.full_per_layer) == status.heads.full == 4
    assert sum(status.heads.streaming_per_layer) == status.heads.streaming == 4
    assert [len(row) for row in status.head_map.full] == [2] * 4
    assert status.capacity.block_size == BLOCK
    assert status.models == ["a", "b"]
