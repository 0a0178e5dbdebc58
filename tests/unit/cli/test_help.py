"""Every help text of every command, as a user reads it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from rlkv_vllm.cli import app
from tests.unit.test_prose import BANNED

#: So wide that no text wraps.
WIDE = {"COLUMNS": "1000"}
#: Options whose value comes from somewhere else where the user gives none.
FALLS_BACK = {
    "block_size", "dtype", "eager", "kv_cache_dtype", "max_model_len", "memory", "rounds",
    "sink", "sparsity", "threads", "window",
}  # fmt: skip


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))
OPTIONS = [
    pytest.param(path, option, id=" ".join([*path, str(option.name)]))
    for path, command in COMMANDS.items()
    for option in command.params
    if path != ("serve",)
]


@functools.cache
def shown(path: tuple[str, ...]) -> str:
    result = CliRunner(env=WIDE).invoke(app, [*path, "--help"])
    assert result.exit_code == 0, result.output
    return " ".join(re.sub("[\u2500-\u257f]", " ", result.output).split())


def help_of(option: click.Parameter) -> str:
    return " ".join((getattr(option, "help", None) or "").split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_in_plain_words(path: tuple[str, ...]) -> None:
    output = shown(path)
    assert not BANNED.search(output)
    assert not re.search(r"\s\.(\s|$)", output)


@pytest.mark.parametrize(("path", "option"), OPTIONS)
def test_every_help_is_printed_as_it_was_written(
    path: tuple[str, ...], option: click.Parameter
) -> None:
    """Rich reads square brackets as markup and leaves them out."""
    text = help_of(option)
    assert text
    assert text in re.sub(r" \[default: [^]]*\]", "", shown(path))


@pytest.mark.parametrize(("path", "option"), OPTIONS)
def test_every_default_is_shown(path: tuple[str, ...], option: click.Parameter) -> None:
    text = help_of(option)
    if option.required or getattr(option, "is_flag", False) or option.name == "version":
        return
    if option.default in (None, "", ()):
        assert option.name not in FALLS_BACK or "default" in text.lower(), text
        return
    default = getattr(option.default, "value", option.default)
    assert f"[default: {default}]" in shown(path)


def test_serve_shows_its_defaults() -> None:
    output = shown(("serve",))
    for flag in ("mode", "sparsity", "sink", "window"):
        assert re.search(rf" --{flag} (?:(?! --).)*\(default: [^)]+\)", output), flag
