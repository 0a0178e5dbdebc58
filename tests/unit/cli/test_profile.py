import json
import os

import pytest
from typer.testing import CliRunner

from rlkv_vllm.allocation import allocate
from rlkv_vllm.cli.profile import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import lookup
from rlkv_vllm.profile.io import load_profile, profile_text, save_profile
from rlkv_vllm.profile.schema import json_schema_text
from tests.support import ROOT
from tests.support.profiles import (
    assert_one_line,
    make_model_dir,
    make_profile,
    measured_row,
    random_gates,
    write_tsv,
)

GIB = 2**30


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with profile p.json, model folder m, and packaged profile `small`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lookup, "packaged_folders", lambda: (tmp_path / "packaged",))
    save_profile(make_profile(), "p.json")
    save_profile(make_profile(recommended_sparsity=None), "none.json")
    save_profile(make_profile(), "packaged/small.json")
    make_model_dir(tmp_path / "m")
    return tmp_path


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(*args):
    """The one-line error that the command line prints before it exits."""
    with pytest.raises(RlkvError) as caught:
        CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert_one_line(caught.value)
    return str(caught.value)


def test_list(here):
    output = run("list")
    for word in ("small", "org/model", "4 x 2", "head-importance", "0.5"):
        assert word in output
    (here / "packaged" / "small.json").unlink()
    assert "no packaged profiles" in run("list")


def test_show():
    output = run("show", "small")
    for word in (
        "org/model @ abc",
        "4 layers, 4 query heads, 2 KV heads of 64",
        "16 / 64 tokens",
        "torch 2.13",
        "2026-01-02",
        "sums",
        "0.950",
        "0.970",
        "80.5",
        "4 full heads, 4 streaming heads",
        make_profile().sha256(),
    ):
        assert word in output, output
    assert "7 full heads, 1 streaming heads" in run("show", "p.json", "--sparsity", 0.1)
    assert "pass --sparsity" in run("show", "none.json")


def test_show_prints_names_as_they_are(here):
    model = make_profile().model.model_copy(update={"id": "[red]x[/red] :smile:"})
    save_profile(make_profile(model=model), "p.json")
    assert "[red]x[/red] :smile:" in run("show", "p.json")


#: What a terminal obeys: colours, the window title, a clear screen (C1), right to left, a new line.
CODES = "\x1b[31mred \x1b]0;title\x07 \x9b2J \u202e\nrlkv: error"


def codes_profile():
    model = make_profile().model.model_copy(update={"id": CODES, "model_type": CODES})
    provenance = make_profile().provenance
    facts = {"method": CODES, "source": CODES, "data": CODES, "versions": {CODES: CODES}}
    (row,) = make_profile().evaluation
    return make_profile(
        model=model,
        provenance=provenance.model_copy(update=facts),
        evaluation=[row.model_copy(update={"task": CODES})],
    )


def test_no_control_code_of_a_profile_reaches_the_terminal(here):
    profile = codes_profile()
    save_profile(profile, "p.json")
    save_profile(profile, "packaged/small.json")
    assert load_profile("p.json").sha256() == profile.sha256()
    make_model_dir(here / "same", model_type=CODES)
    for args in (
        ["list"],
        ["show", "p.json"],
        ["show", "p.json", "--json"],
        ["validate", "p.json", "--model", "same"],
        ["plot", "p.json", "-o", "heads.svg"],
        ["plan", "same", *PLAN[2:]],
        ["export", "p.json", "-o", "duo"],
    ):
        output = run(*args)
        assert all(line.isprintable() for line in output.split("\n")), output
        assert not any(line.startswith("rlkv: error") for line in output.split("\n"))
    assert r"\x1b[31mred" in run("show", "p.json")
    assert r"\x1b[31mred" in fails("validate", "p.json", "--model", "m")


#: One rank streams the second head of every layer at sparsity .5, two ranks others.
UNEVEN = make_profile(gates=[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.0]])


def save_rows(*rows, name="p.json"):
    made = [measured_row(sparsity, lost, profile=UNEVEN, **more) for sparsity, lost, more in rows]
    save_profile(UNEVEN.model_copy(update={"evaluation": made}), name)


def test_show_says_what_rows_prove():
    twos = {"tp_size": 2, "kv_cache_dtype": "fp8"}
    save_rows((0.25, 4, {}), (0.5, 300, {}), (0.5, 0, twos), (0.5, 0, {"allocation": "0" * 64}))
    output = run("show", "p.json")
    lines = [line.split() for line in output.splitlines() if line.strip().startswith("sums")]
    assert [line[6] for line in lines] == ["0.4%", "30.0%", "0.0%", "0.0%"]
    assert [line[8] for line in lines] == ["proven", "violated", "proven", "proven"]
    measured_with = [" ".join(line[9:]) for line in lines]
    assert measured_with == ["1 rank", "1 rank", "2 ranks, fp8", "other heads, sink or window"]
    assert "within 2%: sparsity 0.25, proven: loses 0.4 points" in output
    assert "n 1000, task sums" in output
    assert "no sparsity is within 0.1%" in run("show", "p.json", "--max-loss", "0.1%")
    assert "no sparsity is within 1% on 2 ranks" in run(
        "show", "p.json", "--max-loss", "1%", "--tp", 2
    )


def test_show_of_a_budget_shows_its_heads_and_serves_it():
    save_rows((0.25, 0, {}), (0.5, 9, {}))
    output = run("show", "p.json", "--max-loss", "1%")
    assert "ids at sparsity 0.25" in output
    assert "within 1%: sparsity 0.5, measured: " in output
    assert "; sparsity 0.25, proven: " in output
    command = "next: rlkv serve org/model --profile p.json --max-loss 1%"
    assert output.splitlines()[-1] == command
    save_rows((0.5, 9, {}))
    output = run("show", "p.json", "--max-loss", "1%")
    assert output.splitlines()[-1] == f"{command} --evidence measured"


def test_contradicting_rows_are_a_warning():
    save_rows((0.5, 0, {"seed": 1}), (0.5, 300, {"seed": 2}))
    for output in (run("show", "p.json"), run("validate", "p.json")):
        assert "warning: rows of task sums at sparsity 0.5 contradict each other" in output
    told = json.loads(run("show", "p.json", "--json"))["accuracy_budget"]
    assert (told["proven"], told["measured"]) == (None, None)
    assert "contradict" in told["contradiction"]
    save_rows((0.5, 0, {}))
    assert "warning" not in run("show", "p.json")
    assert "warning" not in run("validate", "p.json")


def test_list_says_what_is_within_the_default_budget():
    assert row(run("list"), "small")[-1] == "-"
    save_rows((0.5, 0, {}), name="packaged/small.json")
    assert row(run("list"), "small")[-2:] == ["0.5", "proven"]


def test_show_json_of_a_budget():
    save_rows((0.25, 0, {}), (0.5, 9, {}), (0.5, 0, {"tp_size": 2}))
    told = json.loads(run("show", "p.json", "--json", "--max-loss", "0.01"))
    assert told["sparsity"] == 0.25
    budget = told["accuracy_budget"]
    assert (budget["max_loss"], budget["tensor_parallel_size"]) == (0.01, 1)
    assert (budget["proven"], budget["measured"]) == (0.25, 0.5)
    assert [one["verdict"] for one in budget["rows"]] == ["proven", "measured", "proven"]
    assert [one["measured_with"] for one in budget["rows"]] == ["1 rank", "1 rank", "2 ranks"]
    assert budget["rows"][1]["loss"] == pytest.approx(0.009)
    assert budget["rows"][1]["loss_bound"] > 0.01
    plain = json.loads(run("show", "none.json", "--json"))["accuracy_budget"]
    assert plain["rows"][0]["loss_bound"] is None


def test_plan_within_a_budget():
    save_rows((0.25, 0, {}), (0.5, 0, {"tp_size": 2}))
    output = run(*PLAN, "--max-loss", "1%")
    assert "sparsity 0.25: budget 1%, proven: loses 0.0 points" in output
    assert output.splitlines()[-1] == (
        "next: rlkv serve m --profile p.json --max-loss 1% --max-model-len 4096"
    )
    output = run(*PLAN, "--max-loss", "1%", "--evidence", "measured", "--tp", 2)
    assert "sparsity 0.5: budget 1%, proven" in output
    assert output.splitlines()[-1].endswith(
        "--max-loss 1% --evidence measured --max-model-len 4096 --tensor-parallel-size 2"
    )


def test_show_json():
    shown = json.loads(run("show", "p.json", "--json", "--sparsity", 0.25))
    profile = make_profile()
    assert shown["profile"] == json.loads(profile_text(profile))
    assert shown["sha256"] == profile.sha256()
    assert shown["full_heads"] == [list(ids) for ids in allocate(profile.gates, 0.25).full]
    assert json.loads(run("show", "none.json", "--json"))["full_heads"] is None


def test_validate(here):
    assert "p.json: valid" in run("validate", "p.json")
    make_model_dir(here / "Model")
    output = run("validate", "p.json", "--model", "Model")
    assert "p.json: valid, fits Model" in output
    assert "warning" not in output
    make_model_dir(here / "wrong", layers=9)
    message = fails("validate", "p.json", "--model", "wrong")
    assert "num_layers is 4 in the profile and 9 in the model" in message


def test_validate_warns_of_another_model_of_the_same_shape():
    output = run("validate", "p.json", "--model", "m")
    assert "valid, its shape fits m" in output
    assert "warning: it was made for org/model, not for m" in output


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["list"], "rlkv profile show small"),
        (["show", "p.json"], "rlkv serve org/model --profile p.json"),
        (
            ["show", "p.json", "--sparsity", 0.4],
            "rlkv serve org/model --profile p.json --sparsity 0.4",
        ),
        (["show", "none.json"], "rlkv profile show none.json --sparsity 0.5"),
        (["validate", "p.json"], "rlkv serve org/model --profile p.json"),
        (
            ["validate", "none.json", "--model", "m"],
            "rlkv serve m --profile none.json --sparsity 0.5",
        ),
        (
            ["import", "duo", "--model", "m", "-o", "a b.json"],
            "rlkv serve m --profile 'a b.json' --sparsity 0.5",
        ),
        (
            ["export", "p.json", "-o", "duo"],
            "rlkv profile import duo --model org/model -o again.json",
        ),
        (["plot", "p.json", "-o", "p.png"], "rlkv serve org/model --profile p.json"),
        (
            ["plan", "m", "p.json", "--max-model-len", 4096, "--memory", "1GiB", "--tp", 2],
            "rlkv serve m --profile p.json --max-model-len 4096 --tensor-parallel-size 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_last_line_is_the_next_command(args, command):
    run("export", "p.json", "-o", "duo")
    assert run(*args).splitlines()[-1] == f"next: {command}"


def test_a_strange_model_id_is_no_part_of_the_next_command():
    model = make_profile().model.model_copy(update={"id": "--trust-remote-code"})
    save_profile(make_profile(model=model), "p.json")
    assert run("validate", "p.json").splitlines()[-1] == "next: rlkv serve MODEL --profile p.json"


def test_import_and_export_round_trip(here):
    gates = random_gates(4, 2, seed=3)
    gates[1][1] = -0.01
    write_tsv(here / "adapter_weights.tsv", gates)
    output = run("import", "adapter_weights.tsv", "--model", "m", "-o", "out/new.json")
    assert "sink 16, window 64; 1 gates clipped" in output
    profile = load_profile("out/new.json")
    assert profile.gates[1][1] == 0.0
    run("import", here, "--model", "m", "-o", "new.json", "--sink", 4, "--window", 32)
    assert (load_profile("new.json").sink, load_profile("new.json").window) == (4, 32)
    run("export", "out/new.json", "--format", "duo-attention", "-o", "duo")
    run("import", "duo", "--model", "m", "-o", "again.json")
    assert load_profile("again.json").gates == profile.gates
    run("export", "out/new.json", "-o", "binary", "--sparsity", 0.5)
    run("import", "binary", "--model", "m", "-o", "binary.json")
    assert sum(map(sum, load_profile("binary.json").gates)) == 4


def test_failed_import_and_export_leave_the_output_alone(here):
    (here / "adapter_weights.tsv").write_text("0.5\t0.5\n0.5\t")
    before = sorted(os.listdir(here))
    text = (here / "p.json").read_text()
    fails("import", "adapter_weights.tsv", "--model", "m", "-o", "p.json")
    fails("import", "adapter_weights.tsv", "--model", "nowhere", "-o", "p.json")
    fails("import", "adapter_weights.tsv", "--model", "m", "-o", "new/p.json")
    fails("export", "p.json", "-o", "duo", "--sparsity", 2)
    fails("export", "missing.json", "-o", "duo")
    fails("plot", "none.json", "-o", "p.png")
    assert sorted(os.listdir(here)) == before
    assert (here / "p.json").read_text() == text


def test_failed_write_leaves_the_output_alone(here, monkeypatch):
    write_tsv(here / "adapter_weights.tsv", random_gates(4, 2))
    before = sorted(os.listdir(here))
    text = (here / "p.json").read_text()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlkv_vllm.files.os.fsync", full_disk)
    message = fails("import", "adapter_weights.tsv", "--model", "m", "-o", "p.json")
    assert "p.json: cannot be written (No space left on device)" in message
    assert sorted(os.listdir(here)) == before
    assert (here / "p.json").read_text() == text


def test_plot(here):
    run("plot", "p.json", "-o", "heads.png")
    assert (here / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert ".png" in fails("plot", "p.json", "-o", "heads.jpeg")


PLAN = ["plan", "m", "p.json", "--block-size", 16, "--max-model-len", 4096, "--memory", "1GiB"]


def row(output, start):
    line = next(line for line in output.splitlines() if line.strip().startswith(start))
    return line.strip()[len(start) :].split()


def test_plan():
    output = run(*PLAN)
    assert row(output, "0") == ["4", "4", "4"]
    # 2 x 64 x 2 bytes per head and token; 4 of 8 heads are full.
    assert row(output, "one more token") == ["1", "KiB", "2", "KiB", "0.500"]
    assert row(output, "a request of 4096 tokens") == ["4.094", "MiB", "8", "MiB", "0.512"]
    assert row(output, "blocks in 1 GiB") == ["65536", "32768", "2.000"]
    assert row(output, "such requests at once") == ["250", "127", "1.969"]


def test_plan_per_rank_type_and_block_size():
    output = run(*PLAN, "--tp", 2, "--dtype", "float32", "--block-size", 32, "--sparsity", 0.375)
    assert [row(output, rank)[:2] for rank in "01"] in (
        [["3", "1"], ["2", "2"]],
        [["2", "2"], ["3", "1"]],
    )
    assert "block size 32" in output
    assert row(output, "one more token") == ["1.5", "KiB", "2", "KiB", "0.750"]


def test_plan_of_an_8_bit_cache_has_blocks_that_the_engine_takes():
    profile = ROOT / "head_profiles" / "embedded.json"
    plan = ["plan", "embedded", profile, "--max-model-len", 2048, "--memory", "1GiB"]
    assert "block size 16" in run(*plan)
    assert "block size 32" in run(*plan, "--dtype", "fp8")


CLUSTER = ["plan", "big", "p.json", "--max-model-len", 4096, "--sparsity", 0.5]
TRAFFIC = ["--rate", 400, "--prompt-tokens", 256, "--output-tokens", "500-1500"]


@pytest.fixture
def big(here):
    """A model folder whose config says all that a step's time depends on."""
    make_model_dir(here / "big", intermediate_size=8192, vocab_size=32000, hidden_size=2048)


@pytest.mark.usefixtures("big")
def test_plan_of_a_cluster():
    output = run(*CLUSTER, *TRAFFIC, "--gpu", "h100-80gb", "--memory", "256MiB")
    assert "prompts of 256 and outputs of 1,000 tokens on average; H100-80GB x 1" in output
    found = {name: row(output, name) for name in ("full cache  ", "full cache + FP8", "split  ")}
    at_once, limit, _, _, rate, replicas, gpus = found["full cache  "]
    assert limit == "memory"
    assert int(replicas) == int(gpus) == pytest.approx(400 / (0.8 * float(rate)), abs=1)
    assert int(found["full cache + FP8"][0]) == pytest.approx(2 * int(at_once), rel=0.02)
    assert 1.6 * int(at_once) < int(found["split  "][0]) < 2 * int(at_once)
    assert "the engine refuses it on GPUs today" in " ".join(row(output, "split + FP8"))


@pytest.mark.usefixtures("big")
def test_plan_of_a_cluster_reads_gpus_and_takes_what_they_leave():
    own = run(*CLUSTER, *TRAFFIC, "--gpu", "24GiB,300,121", "--efficiency", 1)
    named = run(*CLUSTER, *TRAFFIC, "--gpu", "L4", "--efficiency", 1)
    assert row(own, "split  ") == row(named, "split  ")
    slow = run(*CLUSTER, *TRAFFIC, "--gpu", "L4", "--efficiency", 0.5)
    steps = [float(row(output, "split  ")[-5]) for output in (own, slow)]
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.01)


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (CLUSTER, ["--memory", "--gpu"]),
        ([*CLUSTER, "--rate", 5], ["--rate 5", "--gpu, --prompt-tokens, --output-tokens"]),
        ([*CLUSTER, "--memory", "1GiB", "--gpu", "L4"], ["--gpu", "--rate"]),
        ([*CLUSTER, *TRAFFIC, "--gpu", "Z9"], ["--gpu Z9", "H100-80GB", "80GiB,3350,989"]),
        ([*CLUSTER, *TRAFFIC, "--gpu", "2GiB,300,121"], ["--gpu 2GiB", "no room"]),
        ([*CLUSTER, *TRAFFIC, "--gpu", "L4", "--load", 2], ["--load 2"]),
        ([*CLUSTER, *TRAFFIC, "--gpu", "L4", "--tpot", 0.001], ["--tpot 0.001", "--tp"]),
        ([*CLUSTER, *TRAFFIC, "--gpu", "L4", "--memory", "1MiB"], ["does not fit", "--gpu"]),
        (["plan", "m", *CLUSTER[2:], *TRAFFIC, "--gpu", "L4"], ["intermediate_size"]),
    ],
)
def test_mistakes_in_a_cluster(args, parts):
    message = fails(*args)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("size", "blocks"),
    [("1GiB", GIB // 16384), ("512 MiB", GIB // 32768), ("1G", 10**9 // 16384)],
)
def test_plan_reads_sizes(size, blocks):
    output = run(*PLAN[:-1], size)
    assert row(output, "blocks in")[2] == str(blocks)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([*PLAN, "--sparsity", 1.5], ["--sparsity 1.5", "[0, 1]"]),
        ([*PLAN, "--sparsity", "nan"], ["--sparsity nan"]),
        ([*PLAN, "--sparsity", "-0.1"], ["--sparsity -0.1"]),
        ([*PLAN, "--tp", 3], ["--tp 3", "2 KV heads"]),
        ([*PLAN, "--tp", 0], ["--tp 0"]),
        ([*PLAN, "--block-size", 0], ["--block-size 0"]),
        ([*PLAN[:-1], "8Q"], ["--memory 8Q", "8GiB"]),
        ([*PLAN[:-1], "much"], ["--memory much", "8GiB"]),
        ([*PLAN[:-1], "0"], ["--memory 0"]),
        ([*PLAN[:-1], "9" * 400 + "GiB"], ["--memory 999"]),
        ([*PLAN[:5], "--max-model-len", 0, *PLAN[7:]], ["--max-model-len 0"]),
        (["plan", "m", "none.json", *PLAN[3:]], ["none.json", "--sparsity"]),
        ([*PLAN, "--max-loss", "1"], ["--max-loss 1", "did you mean 1%?"]),
        ([*PLAN, "--max-loss", "1%", "--sparsity", 0.5], ["--max-loss 1%", "--sparsity 0.5"]),
        ([*PLAN, "--evidence", "measured"], ["--evidence measured", "--max-loss"]),
        (
            [*PLAN, "--max-loss", "1%", "--dtype", "fp8"],
            ["another KV cache type", "rlkv eval m --task TASK", "--kv-cache-dtype fp8"],
        ),
        ([*PLAN, "--max-loss", "1%", "--tp", 2], ["p.json", "--tensor-parallel-size 2"]),
        (["show", "p.json", "--max-loss", "nan"], ["--max-loss nan"]),
        (["show", "p.json", "--max-loss", "1%", "--sparsity", 0.5], ["remove one of them"]),
        (["show", "p.json", "--tp", 3], ["--tp 3"]),
        (["plan", "nowhere", *PLAN[2:]], ["nowhere", "neither a folder"]),
        (
            ["plan", "wrong", *PLAN[2:]],
            ["num_kv_heads is 2 in the profile and 4 in the model"],
        ),
        (["show", "missing.json"], ["missing.json", "rlkv profile list"]),
        (["show", "truncated.json"], ["truncated.json", "truncated"]),
        (["show", "nan.json"], ["nan.json", "NaN"]),
        (["show", "range.json"], ["range.json", "layer 1, KV head 0", "[0, 1]"]),
        (["show", "shape.json"], ["shape.json", "3 rows", "num_layers is 4"]),
        (["show", "m"], ["m: not a plain file"]),
        (["show", "p.json", "--sparsity", 1.5], ["--sparsity 1.5"]),
        (["import", "nothing.tsv", "--model", "m", "-o", "x.json"], ["nothing.tsv"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_that_names_it(here, args, parts):
    make_model_dir(here / "wrong", heads=4)
    text = profile_text(make_profile())
    raw = json.loads(text)
    (here / "truncated.json").write_text(text[:300])
    (here / "nan.json").write_text(text.replace('"window": 64', '"window": NaN'))
    (here / "shape.json").write_text(json.dumps(raw | {"gates": raw["gates"][:3]}))
    raw["gates"][1][0] = 1.001
    (here / "range.json").write_text(json.dumps(raw))
    message = fails(*args)
    for part in parts:
        assert part in message, message
    assert not (here / "x.json").exists()


def test_schema():
    assert run("schema") == json_schema_text()
