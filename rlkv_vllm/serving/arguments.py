"""The command line of ``rlkv serve``: vLLM's server flags and our own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rlkv_vllm import models
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line
from rlkv_vllm.serving import progress
from rlkv_vllm.serving.flags import FlagParser, bad_flags

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

#: Time for running requests to finish after Ctrl-C or SIGTERM. With vLLM's default of 0 the
#: engine is killed and logs errors.
SHUTDOWN_TIMEOUT_S = 10

_USAGE = (
    "rlkv serve [MODEL] [--profile P | --mode gated] [--sparsity S | --max-loss L] [--sink N] "
    "[--window N] [vLLM flags]"
)

_HELP = f"""\
usage: {_USAGE}

Serve MODEL through vLLM's OpenAI-compatible server with a KV cache that is split per
head. Without MODEL: the embedded reasoner with its own profile.

{{options}}
vLLM flags used most (every flag of `vllm serve` is accepted, unchanged):
  --host, --port        where to listen (default: all interfaces, 8000)
  --max-model-len N     longest request, prompt and answer together (tokens)
  --dtype T             float32, bfloat16, float16 or auto
  --kv-cache-memory-bytes N
                        size of the KV cache, e.g. 8G
  --block-size N        tokens per cache block, a multiple of 16 (default: 32, or 16 where
                        32 wastes memory)
  --tensor-parallel-size N, --max-num-seqs N, --enforce-eager
  --reasoning-parser P  how to separate the chain of thought, e.g. deepseek_r1, qwen3
  --api-key KEY         required from clients on every route but /health, /rlkv and /metrics
  --served-model-name NAME
  --config FILE         all of this from a YAML file; flags win

rlkv serve --help=all lists every flag; VLLM_LOGGING_LEVEL=INFO shows vLLM's log.
"""

_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "--mode": {
        "choices": ("split", "gated"),
        "default": "split",
        "help": "split: serve a head profile. gated: full caches and a gate per KV head, which "
        "`rlkv train` sets while the server runs (default: split)",
    },
    "--profile": {
        "metavar": "P",
        "help": "head profile: a file, a packaged name (rlkv profile list), or "
        "org/repo[@revision][:file] on the Hugging Face hub",
    },
    "--sparsity": {
        "metavar": "S",
        "type": float,
        "help": "share of KV heads that keep only sink and window, 0 to 1 "
        "(default: the profile's recommended sparsity)",
    },
    "--max-loss": {
        "metavar": "L",
        "help": "accuracy that may be lost against the full cache, e.g. 1%% or 0.01: the "
        "profile's evaluation rows choose the sparsity",
    },
    "--evidence": {
        "choices": ("proven", "measured"),
        "help": "what the rows must show with --max-loss: proven, by a 95%% bound, or measured, "
        "on at least 200 problems (default: proven)",
    },
    "--sink": {
        "metavar": "N",
        "type": int,
        "help": "first tokens that streaming heads keep "
        "(default: the profile's; gated: 128, embedded 4)",
    },
    "--window": {
        "metavar": "N",
        "type": int,
        "help": "last tokens that streaming heads keep "
        "(default: the profile's; gated: 256, embedded 16)",
    },
    "--guard-metrics": {
        "action": "store_true",
        "help": "with --api-key: /metrics needs the key, too",
    },
    "--open-routes": {
        "action": "store_true",
        "help": "with --api-key: only routes under /v1 need the key, as in vLLM",
    },
}


def parse_early(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line as they are given; needs no vLLM.

    Raises:
        RlkvError: a flag does not exist, or has no or a wrong value.
    """
    parser = FlagParser(add_help=False)
    _add_own_options(parser)
    args = parser.parse_flags(arguments)
    _fill_in_model(args)
    return args


def short_help() -> str:
    """The output of ``rlkv serve --help``; needs no vLLM."""
    parser = argparse.ArgumentParser(prog="rlkv serve", add_help=False)
    _add_own_options(parser)
    return _HELP.format(options=parser.format_help().split("\n\n", 1)[1])


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("split KV cache")
    for flag, settings in _OWN_OPTIONS.items():
        group.add_argument(flag, **settings)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with vLLM's own parser and fill in what the embedded model needs.

    Raises:
        RlkvError: vLLM's parser refused; its message in one line.
    """
    try:
        parser = _server_parser()
    except Exception as error:  # vLLM loads every plugin here, and a plugin may raise anything
        raise RlkvError(
            f"a vLLM plugin fails ({type(error).__name__}: {' '.join(str(error).split())}): "
            "VLLM_PLUGINS=rlkv leaves all others out"
        ) from error
    try:
        args = parser.parse_args(list(arguments))
    except RlkvError:
        raise
    except (ValueError, OSError, IndexError) as error:  # --config FILE, dotted flags
        raise bad_flags(error) from error
    _fill_in_model(args)
    args.dtype = args.dtype or "auto"
    args.enforce_eager = bool(args.enforce_eager)
    return args


def _fill_in_model(args: argparse.Namespace) -> None:
    args.model_name = args.model_tag or args.model or models.MODEL_NAME
    args.model = args.model_tag = models.model_source(args.model_name)
    for name, value in models.serving_defaults(args.model_name).items():
        if name == "profile" and args.mode == "gated":
            continue
        if not getattr(args, name) and getattr(args, name) is not False:
            setattr(args, name, value)


def _server_parser() -> FlexibleArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise bad_flags(message)

    parser = make_arg_parser(Parser(prog="rlkv serve", usage=_USAGE))
    _add_own_options(parser)
    # None: not given. vLLM's own defaults would hide that.
    parser.set_defaults(
        model=None, dtype=None, enforce_eager=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )
    if progress.is_quiet():  # no bars of weight shards between the lines
        parser.set_defaults(use_tqdm_on_load=False)
    return parser


def add_split(args: argparse.Namespace, split: dict[str, Any]) -> None:
    """Put the configuration of the split where vLLM hands it to every process.

    Raises:
        RlkvError: the user gave a flag of `rlkv_vllm.engine.launch.engine_options` another value.
    """
    from rlkv_vllm.engine.launch import engine_options

    additional = args.additional_config or {}
    if not isinstance(additional, dict):
        raise RlkvError(
            f"--additional-config {one_line(json.dumps(additional, default=str))}: must be a JSON "
            "object: fix or remove it"
        )
    if "rlkv" in additional:
        raise RlkvError(
            "--additional-config has an entry 'rlkv': remove it, and give `rlkv serve` --profile, "
            "--sparsity or --max-loss, --sink and --window instead"
        )
    options = engine_options(split, additional)
    if args.block_size is not None:
        options.pop("block_size", None)
    for name in ("worker_extension_cls", "scheduler_cls", "worker_cls"):
        given, needed = getattr(args, name), options.get(name)
        if needed is not None and given not in ("", "auto", None, needed):
            raise RlkvError(
                f"--{name.replace('_', '-')} {given}: the split cache needs {needed} here: remove "
                "the flag"
            )
    for name, value in options.items():
        setattr(args, name, value)
