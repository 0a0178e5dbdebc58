"""The flags of vLLM's server, read without importing vLLM.

:file:`flags.json` has them by version of vLLM: the spellings of each flag, and its ``nargs``.
``python -m rlkv_vllm.serving.flags`` writes it for the installed version.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from rlkv_vllm.engine.compat import installed_vllm
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.files import one_line

FLAGS_FILE = Path(__file__).with_name("flags.json")
_TYPES = {"port": int, "api_server_count": int, "tensor_parallel_size": int}
_DEFAULTS = {"port": 8000}


def bad_flags(reason: object) -> RlkvError:
    """The error for flags that a parser refuses."""
    return RlkvError(f"{one_line(reason, 400)}: see `rlkv serve --help`")


class FlagParser(argparse.ArgumentParser):
    """Knows vLLM's flags by name; values other than numbers of ours stay text."""

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, with the flag that was probably meant."""
        unknown = re.fullmatch(r"unrecognized arguments: (-\S+).*", message, re.DOTALL)
        if unknown:
            name = unknown[1].split("=")[0]
            close = difflib.get_close_matches(name, self._option_string_actions, 1)
            message = f"{name}: no such flag" + (f", did you mean {close[0]}?" if close else "")
        raise bad_flags(message)

    def parse_flags(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line of ``rlkv serve`` before vLLM is imported.

        Returns:
            Our flags, ``model_tag``, and vLLM's: None where they are not given.

        Raises:
            RlkvError: a flag does not exist, or has no or a wrong value. Unknown ones pass where
                the file does not know this version of vLLM.
        """
        versions = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))
        known = versions.get(_vllm_version())
        self.add_argument("model_tag", nargs="?")
        for spellings, nargs in known or next(iter(versions.values())):
            name = max(spellings, key=len).lstrip("-").replace("-", "_")
            settings: dict[str, Any] = {"nargs": nargs, "type": _TYPES.get(name)}
            if nargs == 0:
                settings = {"action": "store_const", "const": True}
            self.add_argument(*spellings, default=_DEFAULTS.get(name), **settings)
        plain = _plain(arguments)
        # A platform plugin may add flags.
        is_complete = known and not entry_points(group="vllm.platform_plugins")
        return self.parse_args(plain) if is_complete else self.parse_known_args(plain)[0]


def _vllm_version() -> str:
    return ".".join((installed_vllm() or "").split(".")[:2])


def _plain(arguments: Sequence[str]) -> list[str]:
    """As vLLM's parser reads them: dashes for underscores, ``-O3`` and ``--flag.key`` by name."""
    plain: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, *value = argument.split("=", 1)
            name = flag.split(".")[0].replace("_", "-")
            plain.append("=".join([name, *value]))
        elif argument.startswith("-O"):
            level = argument[2:].removeprefix("=")
            plain += ["--optimization-level", *([level] if level else [])]
        else:
            plain.append(argument)
    return plain


def installed_flags() -> list[tuple[list[str], int | str | None]]:
    """All spellings and ``nargs`` of every flag of the installed vLLM."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return sorted(
        (list(action.option_strings), action.nargs)
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    )


def main() -> None:
    """Write the flags of the installed vLLM."""
    known = json.loads(FLAGS_FILE.read_text(encoding="utf-8")) if FLAGS_FILE.exists() else {}
    known[_vllm_version()] = installed_flags()
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(flag) for flag in flags) + "\n]"
        for name, flags in sorted(known.items())
    ]
    FLAGS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
