"""The GPU kernels under Triton's interpreter against the plain-torch oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the GPU kernels need triton (Linux)")
# With RLKV_TEST_DEVICE=cuda (`make test-gpu`) the same tests run on a GPU, compiled.
DEVICE = os.environ.get("RLKV_TEST_DEVICE", "cpu")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("RLKV_TEST_DEVICE=cuda, but torch sees no CUDA GPU", allow_module_level=True)
INTERPRET = pytest.MonkeyPatch()
if DEVICE == "cpu":
    INTERPRET.setenv("TRITON_INTERPRET", "1")  # read when the kernels are defined, and later
from tests.support import ROOT  # noqa: E402
from tests.support.split_steps import SplitStep  # noqa: E402

INTERPRET.undo()

from rlkv_vllm.kernels.triton.decode import MAX_SPLITS, Workspace, num_splits  # noqa: E402
from rlkv_vllm.kernels.triton.layer_cache import LayerCache  # noqa: E402

# Rows of a tile that no query fills are 0 / 0 and never stored.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
KINDS = ([True] * 3, [False] * 3, [True, False, False], [False, True, False, True])


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def make_step(*args: Any, **kwargs: Any) -> SplitStep:
    return SplitStep(*args, device=DEVICE, **kwargs)


def check(step: SplitStep) -> None:
    """Output, pages and all that must not be touched."""
    before = [cache.cpu().clone() for cache in step.caches]
    out, expected = step.run().float(), step.expected()
    error = (out - expected).norm() / expected.norm()
    assert error < TOLERANCE[step.dtype], f"{error:.2e} for {step.requests} {step.full}"
    k, v = step.new_rows(step.k), step.new_rows(step.v)
    after = [cache.cpu() for cache in step.caches]
    for h, (cache, old) in enumerate(zip(after, before, strict=True)):
        slots = (step.full_slots if step.full[h] else step.ring_slots).tolist()
        written = {slot: row for row, slot in enumerate(slots) if slot >= step.block_size}
        flat, flat_old = cache.flatten(0, 1), old.flatten(0, 1)
        for slot, row in written.items():
            assert flat[slot].equal(torch.cat([k[row, h], v[row, h]]))
        others = torch.ones(len(flat), dtype=torch.bool)
        others[list(written)] = False
        assert torch.equal(flat[others].nan_to_num(7.0), flat_old[others].nan_to_num(7.0))


@st.composite
def steps(draw: st.DrawFn, *, gated: bool = False) -> SplitStep:
    requests = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(0, 150), st.just(1)),  # decode
                st.tuples(st.just(0), st.integers(1, 90)),  # whole prompts
                st.tuples(st.integers(1, 150), st.integers(2, 60)),  # chunks
                st.just((0, 0)),  # padding of a CUDA graph
            ),
            min_size=1,
            max_size=4,
        ).filter(lambda found: any(new for _, new in found))
    )
    gates = draw(
        st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0.01, 0.99), min_size=3, max_size=3)
    )
    return make_step(
        requests,
        [True] * 3 if gated else draw(st.sampled_from(KINDS)),
        sink=draw(st.sampled_from([0, 4, 16, 20])),
        window=draw(st.sampled_from([1, 16, 33, 64])),
        block_size=draw(st.sampled_from([16, 32, 64])),
        group=draw(st.sampled_from([1, 2, 7, 16])),
        head_dim=draw(st.sampled_from([64, 96])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        shared=draw(st.sampled_from([0, 0, 48, 96])),
        target_programs=draw(st.sampled_from([1, 8, 64])),
        seed=draw(st.integers(0, 9)),
        gates=gates if gated else None,
    )


@given(steps())
@settings(max_examples=40 if DEVICE == "cpu" else 300)
def test_step_is_the_oracle(step: SplitStep) -> None:
    check(step)


@given(steps(gated=True))
@settings(max_examples=12 if DEVICE == "cpu" else 300)
def test_gated_step_is_the_oracle(step: SplitStep) -> None:
    check(step)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    # Longer than sinks and window, in the pages and in the chunk.
    requests = [(70, 1), (20, 1), (0, 60), (45, 30)]
    check(
        make_step(
            requests, [True] * 2, sink=4, window=16, head_dim=head_dim, dtype=dtype, gates=[0.3, 1]
        )
    )


def test_closed_and_open_gates_are_streaming_and_full_heads() -> None:
    requests, spans = [(300, 1), (30, 1), (0, 90), (150, 40)], {"sink": 5, "window": 32}
    gated = make_step(requests, [True] * 3, gates=[0.0, 1.0, 0.0], **spans)
    split = make_step(requests, [False, True, False], **spans)
    assert torch.equal(gated.new_rows(gated.q)[:-3], split.new_rows(split.q)[:-3])
    torch.testing.assert_close(gated.run(), split.run(), atol=2e-6, rtol=2e-6)


def test_gated_split_kv_is_merged() -> None:
    lengths = [(35, 1), (36, 1), (300, 1), (900, 1)]  # sinks and window are 36 tokens
    gates = [0.0, 1.0, 0.4]
    step = make_step(lengths, [True] * 3, sink=4, window=32, target_programs=90, gates=gates)
    check(step)
    splits = num_splits(4, 3, step.workspace.target_programs, gated=True)
    used = ~step.workspace.lse[: 4 * 6 * splits].view(4, 3, 2, splits).isnan().cpu()
    # Where there is no gap, or it is closed, one program does it all and writes the output.
    assert used.sum(-1)[..., 0].tolist() == [[0, 0, 0], [0, 2, 2], [0, 3, 3], [0, 5, 5]]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    check(
        make_step(
            [(70, 1), (0, 40)], [True, False], sink=4, window=33, head_dim=head_dim, dtype=dtype
        )
    )


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int) -> None:
    check(make_step([(50, 1), (20, 9)], [False, True], sink=4, window=20, group=group))


@pytest.mark.parametrize(
    "requests",
    [[(0, 1000)], [(1000, 1)], [(900, 100)], [(0, 1)], [(1, 1), (0, 1), (0, 2)]],
    ids=str,
)
def test_long_and_short(requests: list[tuple[int, int]]) -> None:
    check(make_step(requests, [True, False], sink=16, window=64, group=4))


@pytest.mark.parametrize("old", range(58, 72))
def test_window_crosses_block_borders(old: int) -> None:
    check(make_step([(old, 1), (old, 3)], [False, True], sink=5, window=32))


def test_split_kv_is_merged_and_unused_splits_are_not_read() -> None:
    lengths = [(5, 1), (255, 1), (256, 1), (257, 1), (900, 1)]
    step = make_step(lengths, [True, False], sink=4, window=32, target_programs=1000)
    check(step)
    assert not step.workspace.lse.isnan().all(), "nothing was split: the test tests nothing"


def test_one_request_shares_blocks_that_another_fills_in_the_same_step() -> None:
    # The second request hit the block that the first one writes in this very step.
    step = make_step([(0, 48), (48, 1)], [True, False], sink=4, window=64, shared=0)
    step.k[1][:48], step.v[1][:48] = step.k[0], step.v[0]
    for table in (step.full_table, step.ring_table):
        table[1, :3] = table[0, :3]
    out, expected = step.run(), step.expected()
    assert (out - expected).norm() / expected.norm() < TOLERANCE[torch.float32]


def test_launches_depend_on_shapes_alone() -> None:
    assert num_splits(1, 0, 528) == 1
    assert num_splits(1, 1, 528) == MAX_SPLITS
    assert num_splits(64, 4, 528) == 4
    assert num_splits(256, 8, 528) == 1
    assert num_splits(256, 8, 528, gated=True) == 2
    for full in range(1, 9):
        assert all(num_splits(r, full, 528) >= num_splits(r + 1, full, 528) for r in range(1, 300))


@pytest.mark.parametrize("gated", [False, True])
def test_workspace_has_room_for_every_batch(gated: bool) -> None:
    space = Workspace.of(
        max_requests=40,
        num_q_heads=8,
        num_kv_heads=4,
        head_dim=64,
        device="cpu",
        gated=gated,
        target_programs=528,
        capability=90,
    )
    most = max(
        r * num_splits(r, full, 528, gated=gated) for r in range(1, 41) for full in range(1, 5)
    )
    assert space.lse.numel() == most * 8
    assert space.output.numel() == most * 8 * 64


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.zeros(4, 16, 96), "head cache 1 is"),
        (torch.zeros(4, 16, 128, dtype=torch.float16), "head cache 1 is"),
        (torch.zeros(4, 32, 128)[:, ::2], "head cache 1 is"),
    ],
)
def test_caches_that_differ_are_refused(second: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCache.of([torch.zeros(4, 16, 128), second], [True, False])


def test_a_whole_cache_with_heads_outside_of_tokens_is_refused() -> None:
    table = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="layout LBNHC"):
        LayerCache.of_whole(torch.zeros(4, 3, 16, 128), table, table)


def test_caches_out_of_line_are_refused() -> None:
    buffer = torch.zeros(4 * 16 * 128 * 2 + 1)
    first = buffer[: 4 * 16 * 128].view(4, 16, 128)
    with pytest.raises(ValueError, match="multiples of 16 elements"):
        LayerCache.of([first, buffer[1 + 4 * 16 * 128 :].view(4, 16, 128)], [True, False])
    with pytest.raises(ValueError, match="last dimension"):
        LayerCache.of([torch.zeros(4, 16, 128, 2)[..., 0]], [True])
    with pytest.raises(ValueError, match="1 head caches, 2 kinds"):
        LayerCache.of([first], [True, False])


def test_compiles_for_gpus_without_spills(tmp_path: Path) -> None:
    """Ahead of time, for sm_80 and sm_90: Triton's compiler and assembler need no GPU."""
    table = tmp_path / "resources.json"
    script = ROOT / "benchmarks" / "kernel_resources.py"
    done = subprocess.run(
        [sys.executable, script, "--head-dim", "64,128", "--group", "4", "--json", table],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(table.read_text())["kernels"]
    kernels = {"write_kernel", "decode_kernel", "merge_kernel", "prefill_kernel"}
    for capability in (80, 90):
        of_it = [row for row in rows if row["capability"] == capability]
        assert {row["kernel"] for row in of_it} == kernels
        assert {row["kernel"] for row in of_it if row["gated"]} == kernels - {"write_kernel"}
        assert all(row["spilled"] == 0 for row in of_it)
        assert all(row["programs_per_sm"] >= 1 for row in of_it)


def test_benchmark_runs_and_its_outputs_are_the_oracles(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "kernels.py"
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--output", tmp_path / "kernels"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert {row["part"] for row in found} == {"copy", "decode", "prefill", "write"}
    errors = [row["error"] for row in found if row["part"] in ("decode", "prefill")]
    assert len(errors) == 12
    assert all(error < 1e-5 for error in errors)
    table = (tmp_path / "kernels.md").read_text()
    assert "| decode | split | 2 | 96 | 0.5 |" in table
    assert "| decode | gated | 2 | 96 | 0 |" in table
