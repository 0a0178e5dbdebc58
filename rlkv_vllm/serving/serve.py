"""``rlkv serve``: check everything that needs no weights, then run vLLM's own server.

Two processes: the one that the user starts checks what needs no vLLM and passes signals on to the
other, which is vLLM's server.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from rlkv_vllm import models
from rlkv_vllm.errors import INSTALL_VLLM, RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.serving import preflight, progress
from rlkv_vllm.serving.arguments import add_split, parse, short_help
from rlkv_vllm.serving.messages import reason
from rlkv_vllm.serving.summary import served_names
from rlkv_vllm.serving.supervise import follow_supervisor, run_supervised

#: Exit status: stopped by the user; ended because the engine's process died.
STOPPED, ENGINE_DIED = 0, 1


def serve(arguments: Sequence[str]) -> int:
    """Serve until stopped; return the exit status.

    Raises:
        RlkvError: refused, before or after loading; one line for the user.
    """
    if "--help" in arguments or "-h" in arguments:
        print(short_help(), end="")
        return 0
    progress.quiet_logging(arguments)
    if follow_supervisor():
        return run_server(arguments)
    progress.say("checking profile, model and flags", must=True)
    try:
        preflight.check_early(arguments)
    except KeyboardInterrupt:
        progress.say("stopped")
        return 128 + signal.SIGINT
    if not find_spec("vllm"):
        raise RlkvError(f"rlkv serve: needs vllm, which is not installed: {INSTALL_VLLM}")
    return run_supervised([sys.executable, "-m", "rlkv_vllm", "serve", *arguments])


def run_server(arguments: Sequence[str]) -> int:
    """Serve in this process; arguments, status and errors as `serve`."""
    preflight.check_plugin()
    preflight.select_plugins()
    _require_vllm()
    args = parse(arguments)
    if args.mode == "gated":
        options = preflight.gated_options(args)
    else:
        options = preflight.split_options(args)
    add_split(args, options)
    preflight.check_server_mode(args)
    preflight.check_api_key(args)
    preflight.check_address(args)
    _check_engine_config(args)
    if note := preflight.note_on_rows(args):
        progress.say(note)
    progress.say(f"starting the engine for {', '.join(served_names(args))}")
    try:
        _run(args)
    except KeyboardInterrupt:
        progress.say("stopped")
    return _exit_status()


def _exit_status() -> int:
    from rlkv_vllm.engine.compat import failed_engine
    from rlkv_vllm.serving.drain import engine_died
    from rlkv_vllm.serving.endpoint import RlkvEndpoint

    dead = failed_engine(RlkvEndpoint.engine_client)
    if dead is None and not engine_died():
        return STOPPED
    name = f"process {dead}" if dead else "or one of its workers"
    progress.say(f"error: the engine {name} ended by itself, so the server ends too")
    return ENGINE_DIED


def _require_vllm() -> None:
    try:
        preflight.import_vllm()
    except RlkvError:
        raise
    except Exception as error:  # a broken installation may raise anything
        raise RlkvError(
            f"vLLM cannot be imported ({type(error).__name__}: {one_line(error)}): "
            f"{INSTALL_VLLM}, see `rlkv doctor`"
        ) from error


def _check_engine_config(args: argparse.Namespace) -> None:
    """Let vLLM and the split cache refuse what they do not support."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from rlkv_vllm.engine.compat import check_shared_memory
    from rlkv_vllm.engine.config import split_plan

    if current_platform.is_cpu():
        note = preflight.choose_cpu_memory(args, models.default_cache_bytes(args.model_name))
        if note:
            progress.say(note)
    try:
        configure_logging_from_args(args)
        validate_parsed_serve_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
            usage_context=UsageContext.OPENAI_API_SERVER
        )
        validate_api_server_args(args)
        check_shared_memory(config)
        plan = split_plan(config)
        if plan is not None:
            preflight.check_capacity(plan, config.cache_config.kv_cache_memory_bytes)
    except RlkvError:
        raise
    except (ValueError, TypeError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        raise RlkvError(f"vLLM refuses this configuration: {reason(error)}") from error


def _run(args: argparse.Namespace) -> None:
    """VLLM's ``serve`` command on parsed arguments.

    Called from Python because the console script of the CPU wheel does not start.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    from rlkv_vllm.engine.config import CONFIG_KEY, GATED, SplitConfig, choose_pinned

    cli_env_setup()
    progress.silence_exit()
    try:
        ServeSubcommand.cmd(args)
    except RlkvError:
        raise
    except (ValueError, RuntimeError, OSError) as error:
        sys.stdout.flush()
        options = args.additional_config[CONFIG_KEY]
        if options.get("mode") != GATED:  # vLLM does not pass on why its engine refused
            choose_pinned(SplitConfig(**options), preflight.target_of(args))
        raise RlkvError(f"the server could not start: {reason(error)}") from error
