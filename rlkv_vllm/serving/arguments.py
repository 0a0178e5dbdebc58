"""The command line of ``rlkv serve``: vLLM's server flags and four of our own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rlkv_vllm import models
from rlkv_vllm.errors import RlkvError

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

#: How long running requests may finish after Ctrl-C or SIGTERM. vLLM's 0 kills
#: the engine, which then complains.
SHUTDOWN_TIMEOUT_S = 10

_USAGE = (
    "rlkv serve [MODEL] [--profile P | --mode gated] [--sparsity S] [--sink N] [--window N] "
    "[vLLM flags]"
)

_HELP = f"""\
usage: {_USAGE}

Serve MODEL through vLLM's OpenAI-compatible server with a KV cache that is split per
head. Without MODEL: the embedded reasoner with its own profile.

{{options}}
vLLM flags used most (every flag of `vllm serve` is accepted, unchanged):
  --host, --port        where to listen (all interfaces, 8000)
  --max-model-len N     longest request, prompt and answer together (tokens)
  --dtype T             float32, bfloat16, float16 or auto
  --kv-cache-memory-bytes N
                        size of the KV cache, e.g. 8G
  --block-size N        tokens per cache block, a multiple of 16 (32, or 16 where 32 wastes)
  --tensor-parallel-size N, --max-num-seqs N, --enforce-eager
  --reasoning-parser P  how to separate the chain of thought, e.g. deepseek_r1, qwen3
  --api-key KEY         required from clients under /v1
  --served-model-name NAME
  --config FILE         all of this from a YAML file; flags win

rlkv serve --help=all lists every flag; VLLM_LOGGING_LEVEL=INFO shows vLLM's log.
"""


def own_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Our own flags, as far as they are on the command line; needs no vLLM."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_own_options(parser)
    try:
        return parser.parse_known_args(list(arguments))[0]
    except argparse.ArgumentError as error:
        raise RlkvError(f"{error}: see `rlkv serve --help`") from error


def short_help() -> str:
    """What ``rlkv serve --help`` prints; needs no vLLM."""
    parser = argparse.ArgumentParser(prog="rlkv serve", add_help=False)
    _add_own_options(parser)
    options = parser.format_help().split("\n\n", 1)[1]
    return _HELP.format(options=options)


def _add_own_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("split KV cache")
    group.add_argument(
        "--mode",
        choices=("split", "gated"),
        default="split",
        help="split: serve a head profile. gated: whole caches and a gate per KV head that "
        "`rlkv train` sets while the server runs (split)",
    )
    group.add_argument(
        "--profile",
        metavar="P",
        help="head profile: a file, a packaged name (rlkv profile list), or "
        "org/repo[@revision][:file] on the Hugging Face hub",
    )
    group.add_argument(
        "--sparsity",
        metavar="S",
        type=float,
        help="share of KV heads that keep only sink and window, 0 to 1 "
        "(the profile's recommended sparsity)",
    )
    group.add_argument(
        "--sink",
        metavar="N",
        type=int,
        help="first tokens that streaming heads keep (profile's; gated: 128, embedded 4)",
    )
    group.add_argument(
        "--window",
        metavar="N",
        type=int,
        help="last tokens that streaming heads keep (profile's; gated: 256, embedded 16)",
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with vLLM's own parser and fill in what the embedded model needs.

    Raises:
        RlkvError: vLLM's parser refused; its message in one line.
    """
    try:
        parser = _server_parser()
    except Exception as error:  # vLLM runs every plugin here, and theirs may raise anything
        raise RlkvError(
            f"a vLLM plugin fails ({type(error).__name__}: {' '.join(str(error).split())}): "
            "VLLM_PLUGINS=rlkv leaves all others out"
        ) from error
    try:
        args = parser.parse_args(list(arguments))
    except RlkvError:
        raise
    except (ValueError, OSError, IndexError) as error:  # --config FILE, dotted flags
        raise RlkvError(f"{' '.join(str(error).split())}: see `rlkv serve --help`") from error
    args.model_name = args.model_tag or args.model or models.MODEL_NAME
    args.model = args.model_tag = models.model_source(args.model_name)
    for name, value in models.serving_defaults(args.model_name).items():
        if name == "profile" and args.mode == "gated":
            continue
        if not getattr(args, name) and getattr(args, name) is not False:
            setattr(args, name, value)
    args.dtype = args.dtype or "auto"
    args.enforce_eager = bool(args.enforce_eager)
    return args


def _server_parser() -> FlexibleArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise RlkvError(f"{' '.join(message.split())}: see `rlkv serve --help`")

    parser = make_arg_parser(Parser(prog="rlkv serve", usage=_USAGE))
    _add_own_options(parser)
    # None tells "not given" from vLLM's own default.
    parser.set_defaults(
        model=None, dtype=None, enforce_eager=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S
    )
    return parser


def add_split(args: argparse.Namespace, split: dict[str, Any]) -> None:
    """Put the split configuration where vLLM hands it to every process.

    Args:
        args: parsed flags; ``additional_config`` and those of :func:`engine_classes`
            are set.
        split: ``additional_config["rlkv"]``.

    Raises:
        RlkvError: the user's flags want the same places.
    """
    from rlkv_vllm.engine.launch import engine_options

    additional = args.additional_config or {}
    if not isinstance(additional, dict):
        raise RlkvError(
            "--additional-config must be a JSON object, got "
            f"{json.dumps(additional, default=str)}: mend or remove it"
        )
    if "rlkv" in additional:
        raise RlkvError(
            "--additional-config already has an entry 'rlkv': with `rlkv serve` say it with "
            "--profile, --sparsity, --sink and --window, and remove the entry"
        )
    options = engine_options(split, additional)
    if args.block_size is not None:
        options.pop("block_size", None)
    for name in ("worker_extension_cls", "scheduler_cls", "worker_cls"):
        given, needed = getattr(args, name), options.get(name)
        if needed is not None and given not in ("", "auto", None, needed):
            raise RlkvError(
                f"--{name.replace('_', '-')} {given}: the split cache needs this place for "
                f"{needed}: remove the flag"
            )
    for name, value in options.items():
        setattr(args, name, value)
