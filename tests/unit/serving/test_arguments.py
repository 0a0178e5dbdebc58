from pathlib import Path

import pytest

from rlkv_vllm import models
from rlkv_vllm.engine.launch import CPU_WORKER, SCHEDULER, WORKER_EXTENSION
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.serving import arguments as arguments_module
from rlkv_vllm.serving.arguments import (
    add_split,
    parse,
    parse_early,
)
from tests.support.profiles import assert_one_line

DEFAULTS = models.serving_defaults(models.MODEL_NAME)
SPLIT = {"profile": "/p.json", "sparsity": 0.5, "sink": 4, "window": 16, "sha256": "0"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    return


def refusal(*arguments: str) -> RlkvError:
    with pytest.raises(RlkvError) as caught:
        parse(arguments)
    return caught.value


def test_without_a_model_the_embedded_one_is_served() -> None:
    for arguments in ([], [models.MODEL_NAME], ["--model", models.MODEL_NAME]):
        args = parse(arguments)
        assert args.model == args.model_tag == str(models.model_dir())
        assert args.model_name == models.MODEL_NAME
        assert {name: getattr(args, name) for name in DEFAULTS} == DEFAULTS


def test_flags_win_over_the_embedded_defaults() -> None:
    args = parse(
        ["--profile", "x", "--served-model-name", "a", "b", "--reasoning-parser", "qwen3"]
        + ["--no-enforce-eager", "--dtype", "bfloat16"]
    )
    assert args.profile == "x"
    assert args.served_model_name == ["a", "b"]
    assert (args.reasoning_parser, args.dtype) == ("qwen3", "bfloat16")
    assert args.enforce_eager is False


def test_weights_load_without_bars_between_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse([]).use_tqdm_on_load
    monkeypatch.setattr(arguments_module.progress, "is_quiet", lambda: True)
    assert not parse([]).use_tqdm_on_load
    assert parse(["--use-tqdm-on-load"]).use_tqdm_on_load


def test_another_model_gets_none_of_the_embedded_defaults() -> None:
    args = parse(["org/model"])
    assert (args.model, args.model_name) == ("org/model", "org/model")
    assert not args.profile
    assert not args.served_model_name
    assert not args.reasoning_parser
    assert args.dtype == "auto"
    assert args.enforce_eager is False


def test_vllm_flags_arrive_unchanged() -> None:
    args = parse(["m", "--max-model-len", "4k", "-tp", "2", "--port", "9", "--api_key", "k"])
    assert (args.max_model_len, args.tensor_parallel_size, args.port) == (4000, 2, 9)
    assert args.api_key == ["k"]


def test_command_line_wins_over_config_file_wins_over_default(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("model: org/model\nsparsity: 0.25\nwindow: 7\nport: 1234\n")
    args = parse(["--config", str(config), "--window", "9"])
    assert (args.model, args.sparsity, args.window) == ("org/model", 0.25, 9)
    assert (args.port, args.sink) == (1234, None)
    config.write_text("model: org/model\nmax-loss: 1%\nevidence: measured\n")
    args = parse(["--config", str(config)])
    assert (args.max_loss, args.evidence, args.sparsity) == ("1%", "measured", None)


def test_vllms_refusals_are_one_line() -> None:
    assert_one_line(refusal("m", "--frobnicate", "3"), "--frobnicate", "rlkv serve --help")
    assert_one_line(refusal("m", "--port", "http"), "--port", "http")
    assert_one_line(refusal("m", "--sparsity", "half"), "--sparsity", "half")
    assert_one_line(refusal("m", "--config", "no.yaml"), "no.yaml")
    assert_one_line(refusal("m", "--config", "no.txt"), "txt")


def test_a_failing_plugin_of_somebody_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise TypeError("missing\nargument")

    monkeypatch.setattr(arguments_module, "_server_parser", fail)
    assert_one_line(refusal("m"), "TypeError: missing argument", "VLLM_PLUGINS=rlkv")


def test_own_options_are_found_among_vllms() -> None:
    own = parse_early(["m", "-tp", "2", "--profile", "p", "--profiler-config", "{}"])
    assert (own.profile, own.sparsity, own.model_tag) == ("p", None, "m")
    with pytest.raises(RlkvError, match="--window"):
        parse_early(["--window", "wide"])


def test_the_split_joins_the_users_additional_config() -> None:
    args = parse(["m", "--additional-config", '{"mine": 1}'])
    add_split(args, SPLIT)
    assert args.additional_config == {"mine": 1, "rlkv": SPLIT}
    assert args.worker_extension_cls == WORKER_EXTENSION
    assert args.scheduler_cls == SCHEDULER
    assert args.worker_cls == CPU_WORKER


def test_the_classes_exist() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    for name in (WORKER_EXTENSION, SCHEDULER, CPU_WORKER):
        assert isinstance(resolve_obj_by_qualname(name), type)


def test_the_split_alone() -> None:
    args = parse(["m", "--worker-extension-cls", WORKER_EXTENSION])
    add_split(args, SPLIT)
    assert args.additional_config == {"rlkv": SPLIT}


def test_places_that_are_taken_are_named() -> None:
    for flag, value in (
        ("--additional-config", '{"rlkv": {}}'),
        ("--worker-extension-cls", "my.Extension"),
        ("--scheduler-cls", "my.Scheduler"),
        ("--worker-cls", "my.Worker"),
    ):
        args = parse(["m", flag, value])
        with pytest.raises(RlkvError) as caught:
            add_split(args, SPLIT)
        assert_one_line(caught.value, flag, "remove")


def test_gated_mode_has_no_profile_and_says_what_was_sampled_from() -> None:
    args = parse(["--mode", "gated"])
    assert args.model_name == models.MODEL_NAME
    assert args.profile is None
    add_split(args, {"mode": "gated"})
    assert args.logprobs_mode == "processed_logprobs"
    assert args.scheduler_cls in (None, "")


@pytest.mark.parametrize(
    ("flags", "mode", "block_size"),
    [([], "gated", 32), (["--block-size", "64"], "gated", 64), ([], "split", None)],
)
def test_gated_mode_on_a_cpu_has_blocks_shorter_than_most_prompts(
    flags: list[str], mode: str, block_size: int | None
) -> None:
    args = parse(flags)
    add_split(args, {"mode": mode})
    assert args.block_size == block_size
