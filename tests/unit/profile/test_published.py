import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkv_vllm.allocation import allocate
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.models import load_model_fingerprint
from rlkv_vllm.profile.io import load_profile, save_profile
from rlkv_vllm.profile.published import (
    DUO_CONFIG,
    DUO_FILE,
    RLKV_FILE,
    export_duo_attention,
    import_published,
)
from tests.support import ROOT
from tests.support.profiles import (
    assert_one_line,
    make_model_dir,
    make_profile,
    random_gates,
    write_tsv,
)

MODEL = make_profile().model  # 4 layers x 2 KV heads
GATES = [[0.5, -0.0106], [1.0078125, 1.0], [0.0, -3.4e-39], [0.25, 0.75]]
CLIPPED = [[0.5, 0.0], [1.0, 1.0], [0.0, 0.0], [0.25, 0.75]]


def write_duo(folder, gates=GATES, **config):
    write_tsv(folder / DUO_FILE, gates)
    (folder / DUO_CONFIG).write_text(json.dumps(config))
    return folder


def test_rlkv_file_and_folder(tmp_path):
    table = write_tsv(tmp_path / RLKV_FILE, GATES)
    profile = import_published(table, MODEL)
    assert profile == import_published(tmp_path, MODEL)
    assert profile.gates == CLIPPED
    assert (profile.sink, profile.window) == (16, 64)
    assert profile.provenance.method == "rlkv"
    assert profile.provenance.config["clipped_gates"] == 3
    assert profile.model == MODEL
    chosen = import_published(table, MODEL, sink=0, window=9)
    assert (chosen.sink, chosen.window) == (0, 9)


def test_a_tsv_of_any_name_is_rlkv(tmp_path):
    assert import_published(write_tsv(tmp_path / "a.tsv", GATES), MODEL).gates == CLIPPED


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({"sink_size": 128, "recent_size": 256}, {}, (128, 256)),
        (
            {
                "sink_size": 128,
                "recent_size": 256,
                "deploy_sink_size": None,
                "deploy_recent_size": None,
            },
            {},
            (128, 256),
        ),
        (
            {
                "sink_size": 128,
                "recent_size": 256,
                "deploy_sink_size": 0,
                "deploy_recent_size": 32,
            },
            {},
            (0, 32),
        ),
        ({"sink_size": 128, "recent_size": 256}, {"sink": 4}, (4, 256)),
        ({}, {"sink": 4, "window": 8}, (4, 8)),
    ],
)
def test_duo_sink_and_window(tmp_path, config, flags, expected):
    folder = write_duo(tmp_path, **config, seed=42, dataset_name="books", lr=0.02)
    profile = import_published(folder, MODEL, **flags)
    assert (profile.sink, profile.window) == expected
    assert profile.provenance.method == "duo-attention"
    assert profile.provenance.seed == 42
    assert profile.provenance.data == "books"
    assert profile.provenance.config["published_config"]["lr"] == 0.02
    assert profile == import_published(folder / DUO_FILE, MODEL, **flags)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"recent_size": 256}, ["sink_size", "--sink"]),
        ({"sink_size": 1, "recent_size": None}, ["recent_size", "--window"]),
        ({"sink_size": "16", "recent_size": 256}, ["sink_size '16'", "--sink"]),
        ({"sink_size": 16, "recent_size": 0}, ["recent_size 0", "--window"]),
        ({"sink_size": math.nan, "recent_size": 9}, ["NaN"]),
    ],
)
def test_duo_config_without_a_usable_size(tmp_path, config, parts):
    with pytest.raises(RlkvError) as caught:
        import_published(write_duo(tmp_path, **config), MODEL)
    assert_one_line(caught.value, str(tmp_path / DUO_CONFIG), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("0.1\t0.2\n0.3\n", ["line 2 has 1 columns"]),
        ("0.1\t0.2\n0.3\tabc\n", ["line 2, column 2", "abc"]),
        ("0.1\tnan\n", ["line 1, column 2", "nan"]),
        ("inf\t0.2\n", ["line 1, column 1", "inf"]),
        ("0.1\t1.2\n", ["line 1, column 2", "1.2"]),
        ("-0.06\t1\n", ["line 1, column 1", "-0.06"]),
        ("0_1\t1\n", ["line 1, column 1", "0_1"]),
        ("0.1\t0.2\n" * 3, ["3 layers x 2 KV heads", "--model org/model", "4 x 2"]),
        ("0.1\t0.2\t0.3\n" * 4, ["4 layers x 3 KV heads"]),
    ],
)
def test_wrong_table(tmp_path, text, parts):
    path = tmp_path / RLKV_FILE
    path.write_text(text)
    with pytest.raises(RlkvError) as caught:
        import_published(path, MODEL)
    assert_one_line(caught.value, str(path), *parts)


@pytest.mark.parametrize(("flag", "value"), [("sink", -1), ("window", 0), ("window", 2**31)])
def test_wrong_flag(tmp_path, flag, value):
    with pytest.raises(RlkvError, match=f"--{flag} {value}"):
        import_published(write_tsv(tmp_path / RLKV_FILE, GATES), MODEL, **{flag: value})


def test_folder_with_none_or_both(tmp_path):
    with pytest.raises(RlkvError) as caught:
        import_published(tmp_path, MODEL)
    assert_one_line(caught.value, str(tmp_path), "neither")
    write_tsv(write_duo(tmp_path) / RLKV_FILE, GATES)
    with pytest.raises(RlkvError) as caught:
        import_published(tmp_path, MODEL)
    assert_one_line(caught.value, str(tmp_path), "both")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(alphabet="0123456789.eE+-_ \t\nnaif\x00\r\u0661\u2028", max_size=60)
    | st.binary(max_size=30).map(lambda raw: raw.decode("latin-1"))
)
def test_any_table_never_raises_anything_else(tmp_path, text):
    path = tmp_path / RLKV_FILE
    path.write_bytes(text.encode())
    model = MODEL.model_copy(update={"num_layers": 1, "num_kv_heads": 1})
    try:
        profile = import_published(path, model)
    except RlkvError as error:
        assert_one_line(error)
    else:
        assert 0 <= profile.gates[0][0] <= 1


def test_truncated_table_at_every_length(tmp_path):
    whole = write_tsv(tmp_path / "whole.tsv", CLIPPED).read_text().rstrip("\n")
    path = tmp_path / RLKV_FILE
    last_cell = len(whole) - len(whole.split("\t")[-1])
    for length in range(last_cell + 1):
        path.write_text(whole[:length])
        with pytest.raises(RlkvError):
            import_published(path, MODEL)


def test_export_and_back(tmp_path):
    profile = make_profile()
    export_duo_attention(profile, tmp_path / "duo")
    again = import_published(tmp_path / "duo", profile.model)
    assert again.gates == profile.gates
    assert (again.sink, again.window) == (profile.sink, profile.window)
    assert (again.provenance.seed, again.provenance.data) == (1, "sums")
    rows = (tmp_path / "duo" / DUO_FILE).read_text().splitlines()
    assert [len(row.split("\t")) for row in rows] == [2] * 4


def test_export_at_a_sparsity_fixes_the_split(tmp_path):
    profile = make_profile(layers=6, heads=4)
    export_duo_attention(profile, tmp_path, 0.3)
    gates = import_published(tmp_path, profile.model).gates
    assert {gate for row in gates for gate in row} == {0.0, 1.0}
    kept = tuple(tuple(h for h, gate in enumerate(row) if gate > 0.5) for row in gates)
    assert kept == allocate(profile.gates, 0.3).full


def test_failed_export_leaves_the_old_files(tmp_path):
    export_duo_attention(make_profile(), tmp_path)
    before = (tmp_path / DUO_FILE).read_text()
    (tmp_path / DUO_CONFIG).unlink()
    (tmp_path / DUO_CONFIG).mkdir()
    with pytest.raises(RlkvError) as caught:
        export_duo_attention(make_profile(gates=random_gates(4, 2, seed=9)), tmp_path)
    assert_one_line(caught.value, DUO_CONFIG)
    assert (tmp_path / DUO_FILE).read_text() == before
    assert sorted(os.listdir(tmp_path)) == sorted([DUO_FILE, DUO_CONFIG])


def _published_files():
    named = os.environ.get("RLKV_PUBLISHED_PROFILES")
    beside = ROOT.parent / "shared" / "data" / "published_profiles"
    return sorted(Path(named or beside).glob("**/*.tsv"))


PUBLISHED_MODELS = {  # model_type, layers, query heads, KV heads, of 128
    "Llama-3.1-8B": ("llama", 32, 32, 8),
    "Qwen-2.5-7B": ("qwen2", 28, 28, 4),
    "Qwen-3-4B": ("qwen3", 36, 32, 8),
}


@pytest.mark.parametrize("table", _published_files() or [None], ids=str)
def test_published_file(table, tmp_path):
    if table is None:
        pytest.skip("no published files: set RLKV_PUBLISHED_PROFILES to a folder with them")
    name = table.parent.name
    model_type, layers, query_heads, kv_heads = next(
        shape for start, shape in PUBLISHED_MODELS.items() if name.startswith(start)
    )
    model = make_model_dir(
        tmp_path / name,
        layers,
        kv_heads,
        model_type=model_type,
        num_attention_heads=query_heads,
        head_dim=128,
    )
    profile = import_published(table.parent, load_model_fingerprint(str(model)))
    save_profile(profile, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    published = [[float(cell) for cell in row.split()] for row in table.read_text().splitlines()]
    assert profile.gates == [[min(max(gate, 0.0), 1.0) for gate in row] for row in published]
    expected = (16, 64) if table.name == RLKV_FILE else (128, 256)
    assert (profile.sink, profile.window) == expected
