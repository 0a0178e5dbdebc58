import logging
import os
import subprocess
import sys

import pytest

from rlkv_vllm.serving import progress


def record(message: str, level: int = logging.INFO, name: str = "vllm.x") -> logging.LogRecord:
    return logging.LogRecord(name, level, "file", 1, message, None, None)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*progress._LEVEL_VARIABLES, *progress._QUIET_ENVIRONMENT):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)
    return


def test_phases_are_renamed_and_other_information_is_dropped() -> None:
    phase = record("Starting to load model org/m...")
    assert progress.StartUpFilter().filter(phase)
    assert phase.getMessage() == "loading weights"
    assert not progress.StartUpFilter().filter(record("non-default args: {}"))


def test_warnings_pass_except_noise() -> None:
    passes = progress.StartUpFilter().filter
    assert passes(record("disk is full", logging.WARNING))
    assert passes(record("boom", logging.ERROR))
    assert not passes(record("Triton is not installed.", logging.WARNING))
    assert not passes(record("Reset SSM cache type to float32 for ...", logging.WARNING))


@pytest.mark.parametrize(
    ("path", "status", "is_shown"),
    [
        ("/v1/rlkv", 200, False),
        ("/v1/rlkv/gates", 200, False),
        ("/metrics?name[]=up", 200, False),
        ("/health", 200, False),
        ("/health", 503, True),
        ("/v1/rlkv", 401, True),
        ("/v1/rlkv/forecast?tokens=5", 200, True),
        ("/v1/chat/completions", 200, True),
    ],
)
def test_of_requests_only_answered_polls_are_left_out(
    path: str, status: int, is_shown: bool
) -> None:
    access = record('%s - "%s %s HTTP/%s" %d', name="uvicorn.access")
    access.args = ("127.0.0.1:1", "GET", path, "1.1", status)
    assert progress.PollFilter().filter(access) is is_shown
    access.args = ("127.0.0.1:1", "POST", path, "1.1", status)
    assert progress.PollFilter().filter(access)


def test_own_messages_always_pass() -> None:
    assert progress.StartUpFilter().filter(record("any", name="vllm.rlkv"))


def test_lines_show_the_level_only_where_it_matters() -> None:
    line = progress.LineFormatter().format
    assert line(record("hello"))[-6:] == " hello"
    assert line(record("hello", logging.WARNING)).endswith(" warning: hello")
    assert line(record("hello")).startswith("rlkv ")


def test_of_a_traceback_the_error_is_shown() -> None:
    failed = record("EngineCore failed to start.", logging.ERROR)
    try:
        raise ValueError("the cache is too small")
    except ValueError:
        failed.exc_info = sys.exc_info()
    lines = progress.LineFormatter().format(failed).splitlines()
    assert [line.partition(" error: ")[2] or line for line in lines] == [
        "EngineCore failed to start.",
        "ValueError: the cache is too small",
    ]


def test_the_users_choice_of_logging_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--log-level", "DEBUG"], ["--logging_config.formatter=json"]):
        progress.quiet_logging(arguments)
        assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    progress.quiet_logging([])
    assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ


def test_quiet_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    progress.quiet_logging(["m", "--port", "1"])
    assert os.environ["VLLM_LOGGING_CONFIG_PATH"] == str(progress._LOGGING_CONFIG)
    assert os.environ["PYTHONWARNINGS"] == "error"
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


def test_a_process_that_inherits_our_choice_logs_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's process has its environment from the one that the user starts."""
    applied: list[object] = []
    monkeypatch.setattr(logging.config, "dictConfig", applied.append)
    for _ in range(2):
        progress.quiet_logging([])
    assert len(applied) == 2


def test_an_engine_process_is_quiet_before_vllm_is_imported() -> None:
    code = (
        "import logging, runpy; runpy.run_module('rlkv_vllm', run_name='__mp_main__');"
        "logging.getLogger('vllm.a').warning('Triton is installed, but');"
        "logging.getLogger('vllm.a').warning('careful')"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_CONFIG_PATH": str(progress._LOGGING_CONFIG)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stderr == ""
    assert found.stdout.endswith(" warning: careful\n")
    assert len(found.stdout.splitlines()) == 1


def test_the_logging_file_works() -> None:
    code = (
        "import logging; from rlkv_vllm.serving.progress import quiet_logging as q; q([]);"
        "logging.getLogger('vllm.a').info('chatter');"
        "logging.getLogger('vllm.a').warning('careful');"
        "logging.getLogger('vllm.rlkv').info('split');"
        "logging.getLogger('uvicorn.error').info('Application startup complete.');"
        "logging.getLogger('uvicorn.access').info('GET /')"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split(" ", 2)[2] for line in out] == [
        "warning: careful",
        "split",
        "ready; Ctrl-C stops the server",
        "GET /",
    ]
