"""`--quick`: smaller defaults, and what a command says first and last."""

from __future__ import annotations

from typing import Any

import typer


def quick_option(**defaults: Any) -> Any:
    """The flag that gives other options these `defaults`; options on the command line win."""

    def apply(ctx: typer.Context, wanted: bool) -> bool:
        if wanted:
            ctx.default_map = defaults
        return wanted

    text = "Fewer of everything, to try the command: a result within minutes."
    return typer.Option("--quick", is_eager=True, callback=apply, help=text)


def say_start(ctx: typer.Context, doing: str) -> None:
    """Say on stderr what begins, before imports that take seconds, and what `--quick` left out."""
    changed = []
    for option in ctx.command.params:
        source = ctx.get_parameter_source(str(option.name))
        if source is not None and source.name == "DEFAULT_MAP":
            usual = "all" if option.default == "" else option.default
            instead = "" if usual is None else f" instead of {usual}"
            changed.append(f"{option.opts[0]} {ctx.params[str(option.name)]}{instead}")
    if changed:
        typer.echo(f"--quick: {', '.join(changed)}", err=True)
    typer.echo(f"{doing} (loading libraries takes some seconds)", err=True)
