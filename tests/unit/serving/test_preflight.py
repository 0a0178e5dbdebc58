import os
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile.io import save_profile
from rlkv_vllm.serving import preflight
from tests.support.plans import make_plan
from tests.support.profiles import assert_one_line, make_model_dir, make_profile, measured_row


def options(tmp_path: Path, **changes: Any) -> Namespace:
    """Flags of a server whose model and profile fit."""
    profile = tmp_path / "heads.json"
    if not profile.exists():
        save_profile(make_profile(), profile)
    given = {
        "model": str(make_model_dir(tmp_path / "model")),
        "model_name": "org/model",
        "profile": str(profile),
        **dict.fromkeys(("revision", "sparsity", "max_loss", "evidence", "sink", "window")),
        **dict.fromkeys(("tensor_parallel_size", "kv_cache_dtype")),
    }
    return Namespace(**(given | changes))


def refusal(args: Namespace) -> RlkvError:
    with pytest.raises(RlkvError) as caught:
        preflight.split_options(args)
    return caught.value


# --- split options ---------------------------------------------------------------------


def test_the_profiles_own_settings_are_the_default(tmp_path: Path) -> None:
    profile = make_profile()
    assert preflight.split_options(options(tmp_path)) == {
        "profile": str(tmp_path / "heads.json"),
        "sparsity": profile.recommended_sparsity,
        "sink": profile.sink,
        "window": profile.window,
        "sha256": profile.sha256(),
    }


def test_flags_win_over_the_profile_also_where_they_are_zero(tmp_path: Path) -> None:
    split = preflight.split_options(options(tmp_path, sparsity=0.0, sink=0, window=1))
    assert (split["sparsity"], split["sink"], split["window"]) == (0.0, 0, 1)


def test_the_profile_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = options(tmp_path)
    monkeypatch.chdir(tmp_path)
    args.profile = "heads.json"
    assert preflight.split_options(args)["profile"] == str(tmp_path / "heads.json")


def test_profile_missing(tmp_path: Path) -> None:
    args = options(tmp_path, profile=None)
    assert_one_line(refusal(args), "--profile", args.model, "rlkv profile list")


@pytest.mark.parametrize(
    "content", ["", "{", '{"schema_version": 1, "gates": [[NaN]]}', "[]", "\x00\xff"]
)
def test_profile_invalid(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="latin-1")
    assert_one_line(refusal(options(tmp_path, profile=str(path))), str(path))


def test_profile_is_looked_at_before_the_model(tmp_path: Path) -> None:
    error = refusal(options(tmp_path, profile="missing.json", model="/no/such/model"))
    assert_one_line(error, "missing.json")
    assert "/no/such/model" not in str(error)


def test_model_missing(tmp_path: Path) -> None:
    error = refusal(options(tmp_path, model="/no/such/model", sparsity=7.0))
    assert_one_line(error, "/no/such/model")
    assert "sparsity" not in str(error)


def test_model_of_another_shape(tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other", layers=5, heads=3)
    error = refusal(options(tmp_path, model=str(other), sparsity=7.0))
    assert_one_line(
        error,
        "num_layers is 4 in the profile and 5 in the model",
        "num_kv_heads is 2 in the profile and 3 in the model",
    )


def test_sparsity_missing(tmp_path: Path) -> None:
    save_profile(make_profile(recommended_sparsity=None), tmp_path / "heads.json")
    assert_one_line(refusal(options(tmp_path)), "--sparsity", "0 to 1")


@pytest.mark.parametrize("sparsity", [1.5, -0.1, float("nan"), float("inf")])
def test_sparsity_out_of_range(tmp_path: Path, sparsity: float) -> None:
    assert_one_line(refusal(options(tmp_path, sparsity=sparsity)), f"--sparsity {sparsity:g}")


def test_sink_and_window_out_of_range(tmp_path: Path) -> None:
    assert_one_line(refusal(options(tmp_path, sink=-1)), "--sink -1")
    assert_one_line(refusal(options(tmp_path, window=0)), "--window 0")


def test_a_budget_goes_to_the_engine_which_knows_its_ranks(tmp_path: Path) -> None:
    profile = make_profile(evaluation=[measured_row(0.5, lost=0)])
    save_profile(profile, tmp_path / "heads.json")
    split = preflight.split_options(options(tmp_path, max_loss="1%", kv_cache_dtype="auto"))
    assert split == {
        "profile": str(tmp_path / "heads.json"),
        "max_loss": 0.01,
        "sink": profile.sink,
        "window": profile.window,
        "sha256": profile.sha256(),
    }
    measured = options(tmp_path, max_loss="1%", evidence="measured")
    assert preflight.split_options(measured) == split | {"evidence": "measured"}


def test_rows_of_another_model_are_told(tmp_path: Path) -> None:
    args = options(tmp_path, max_loss="1%", mode="split")
    note = preflight.note_on_rows(args)  # the folder is called `model`, as in `org/model`
    assert note is None
    args.model = str(make_model_dir(tmp_path / "tuned"))
    note = preflight.note_on_rows(args)
    assert note is not None
    assert "are of org/model, not of tuned" in note
    args.max_loss = None
    assert preflight.note_on_rows(args) is None
    args.mode, args.max_loss = "gated", "1%"
    assert preflight.note_on_rows(args) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_loss": "1%", "sparsity": 0.4}, ["--max-loss 1%", "--sparsity 0.4"]),
        ({"evidence": "measured"}, ["--evidence measured", "--max-loss"]),
        ({"max_loss": "0"}, ["--max-loss 0"]),
        (
            {"max_loss": "1%", "tensor_parallel_size": 2},
            ["another allocation", "--max-loss 1% --write-rows --tensor-parallel-size 2`"],
        ),
        (
            {"max_loss": "1%", "kv_cache_dtype": "fp8"},
            ["another KV cache type", "--write-rows --kv-cache-dtype fp8`"],
        ),
        ({"max_loss": "1%", "sink": 4}, ["another sink or window", "--write-rows --sink 4`"]),
        (
            {"max_loss": "0.1%"},
            ["sparsity 0.5 is undecided: loses 0.2 points", "`rlkv eval org/model --task TASK "],
        ),
    ],
)
def test_a_budget_without_evidence(tmp_path: Path, flags: dict[str, Any], words: list[str]) -> None:
    profile = make_profile(gates=[[0.9, 0.1]] * 4)
    row = measured_row(0.5, lost=2, profile=profile)
    save_profile(profile.model_copy(update={"evaluation": [row]}), tmp_path / "heads.json")
    assert_one_line(refusal(options(tmp_path, **flags)), *words)


# --- gated mode ------------------------------------------------------------------------


def gated(**changes: Any) -> Namespace:
    given = {
        **dict.fromkeys(("profile", "sparsity", "max_loss", "evidence", "sink", "window")),
        "model_name": "m",
        "api_server_count": None,
    }
    return Namespace(**(given | changes))


def test_gated_mode_has_the_published_span_and_the_embedded_model_its_own() -> None:
    assert preflight.gated_options(gated()) == {"mode": "gated", "sink": 128, "window": 256}
    embedded = preflight.gated_options(gated(model_name="embedded", sink=0))
    assert (embedded["sink"], embedded["window"]) == (0, 16)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"profile": "embedded"}, "--profile"),
        ({"sparsity": 0.4}, "--sparsity"),
        ({"max_loss": "1%"}, "--max-loss"),
        ({"evidence": "measured"}, "--evidence"),
        ({"api_server_count": 2}, "--api-server-count"),
        ({"sink": -1}, "--sink -1"),
        ({"window": 0}, "--window 0"),
    ],
)
def test_flags_without_meaning_in_gated_mode(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(RlkvError, match=flag) as caught:
        preflight.gated_options(gated(**changes))
    assert_one_line(caught.value, flag)


# --- server mode -----------------------------------------------------------------------


def mode(**changes: Any) -> Namespace:
    plain = {
        "headless": False,
        "grpc": False,
        "grpc_port": None,
        "data_parallel_multi_port_external_lb": False,
    }
    return Namespace(**(plain | changes))


def test_a_plain_server_is_accepted() -> None:
    preflight.check_server_mode(mode())


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"headless": True}, "--headless"),
        ({"grpc": True}, "--grpc"),
        ({"grpc_port": 1}, "--grpc-port"),
        ({"data_parallel_multi_port_external_lb": True}, "--data-parallel-multi-port"),
    ],
)
def test_modes_without_proof_are_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(RlkvError) as caught:
        preflight.check_server_mode(mode(**changes))
    assert_one_line(caught.value, flag)


def test_the_rust_frontend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(RlkvError, match="VLLM_USE_RUST_FRONTEND"):
        preflight.check_server_mode(mode())


# --- address ---------------------------------------------------------------------------


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(1)
        yield busy.getsockname()[1]


def address_error(**flags: Any) -> RlkvError:
    with pytest.raises(RlkvError) as caught:
        preflight.check_address(Namespace(**({"uds": None, "host": None, "port": 0} | flags)))
    return caught.value


@pytest.mark.parametrize("host", [None, "127.0.0.1", "0.0.0.0"])
def test_a_busy_port_names_the_flag_and_another_port(busy_port: int, host: str | None) -> None:
    error = address_error(host=host, port=busy_port)
    assert_one_line(error, f"--port {busy_port}: in use", f"--port {busy_port + 1}")


def test_a_free_port_is_left_free(busy_port: int) -> None:
    args = Namespace(uds=None, host="127.0.0.2", port=busy_port)
    preflight.check_address(args)
    preflight.check_address(args)


@pytest.mark.parametrize(("keys", "is_refused"), [(None, False), (["k"], False), ([""], True)])
def test_an_empty_key_is_refused(keys: list[str] | None, is_refused: bool) -> None:
    with pytest.raises(RlkvError, match="--api-key") if is_refused else nullcontext():
        preflight.check_api_key(Namespace(api_key=keys))


def test_an_empty_key_is_refused_before_vllm_is_imported() -> None:
    with pytest.raises(RlkvError, match="--api-key"):
        preflight.check_early(["--api-key", "", "--port", "0"])


def test_a_port_that_does_not_exist() -> None:
    assert_one_line(address_error(port=70000), "--port 70000", "65535")


def test_a_host_of_another_machine() -> None:
    assert_one_line(address_error(host="192.0.2.1"), "--host 192.0.2.1")


def test_a_socket_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.touch()
    assert_one_line(address_error(uds=str(path)), f"--uds {path}")


# --- plugins ---------------------------------------------------------------------------


def test_installed_plugin_passes() -> None:
    preflight.check_plugin()


@pytest.mark.parametrize(
    "group",
    [preflight.GENERAL_PLUGINS, preflight.ENDPOINT_PLUGINS, preflight.STAT_LOGGER_PLUGINS],
)
@pytest.mark.parametrize("value", [None, "somebody.elses:register"])
def test_a_plugin_that_vllm_would_not_find(
    monkeypatch: pytest.MonkeyPatch, group: str, value: str | None
) -> None:
    real = preflight.entry_points

    def entry_points(group: str = group, *, broken: str = group) -> list[EntryPoint]:
        if group != broken:
            return list(real(group=group))
        return [EntryPoint("rlkv", value, group)] if value else []

    monkeypatch.setattr(preflight, "entry_points", entry_points)
    with pytest.raises(RlkvError) as caught:
        preflight.check_plugin()
    assert_one_line(caught.value, group, value or "finds none", "install")


def test_a_plugin_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rlkv_vllm.plugin", None)
    with pytest.raises(RlkvError, match="cannot be loaded"):
        preflight.check_plugin()


def test_our_plugin_is_added_to_the_users_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine,other")
    preflight.select_plugins()
    preflight.select_plugins()
    assert os.environ["VLLM_PLUGINS"] == "mine,other,rlkv"


def test_without_a_list_other_plugins_stay_on_and_other_routes_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {
        preflight.GENERAL_PLUGINS: ["rlkv", "a_model", "both"],
        "vllm.platform_plugins": ["a_platform"],
        preflight.ENDPOINT_PLUGINS: ["rlkv", "both", "routes"],
    }
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(
        preflight,
        "entry_points",
        lambda group: [EntryPoint(name, "m:f", group) for name in found.get(group, [])],
    )
    preflight.select_plugins()
    assert os.environ["VLLM_PLUGINS"] == "a_model,a_platform,rlkv"


# --- memory ----------------------------------------------------------------------------


def memory_args(**changes: Any) -> Namespace:
    return Namespace(**({"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.92} | changes))


@pytest.fixture
def half_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    memory = psutil.virtual_memory()._replace(total=100, available=50)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.usefixtures("half_free")
def test_no_more_memory_is_claimed_than_is_free() -> None:
    args = memory_args()
    assert "45%" in (preflight.choose_cpu_memory(args, None) or "")
    assert args.gpu_memory_utilization == 0.45


@pytest.mark.usefixtures("half_free")
def test_memory_settings_of_the_user_stay() -> None:
    small = memory_args(gpu_memory_utilization=0.3)
    assert preflight.choose_cpu_memory(small, None) is None
    assert small.gpu_memory_utilization == 0.3
    sized = memory_args(kv_cache_memory_bytes=7)
    assert preflight.choose_cpu_memory(sized, 99) is None
    assert (sized.kv_cache_memory_bytes, sized.gpu_memory_utilization) == (7, 0.92)


@pytest.mark.usefixtures("half_free")
def test_a_cache_size_of_ours_is_used_where_none_is_given() -> None:
    args = memory_args()
    assert preflight.choose_cpu_memory(args, 99) is None
    assert (args.kv_cache_memory_bytes, args.gpu_memory_utilization) == (99, 0.92)


def test_two_cache_sizes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    note = preflight.choose_cpu_memory(memory_args(kv_cache_memory_bytes=7), None)
    assert note is not None
    assert "VLLM_CPU_KVCACHE_SPACE=4" in note
    assert "--kv-cache-memory-bytes 7" in note
    assert preflight.choose_cpu_memory(memory_args(), 99) is None


# --- capacity --------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_cache_must_hold_one_longest_request(tp_size: int) -> None:
    plan = make_plan(tp_size)
    # One request, and the block that vLLM keeps for itself.
    blocks = plan.forecast.admission_blocks(plan.max_model_len) + 1
    enough = blocks * max(plan.forecast.block_bytes(rank) for rank in plan.forecast.ranks)
    preflight.check_capacity(plan, enough)
    preflight.check_capacity(plan, None)
    with pytest.raises(RlkvError) as caught:
        preflight.check_capacity(plan, enough - 1)
    assert_one_line(caught.value, f"--kv-cache-memory-bytes {enough - 1:,}", "--max-model-len 512")
