"""The ``rlkv`` command: assembly of the sub-commands, and errors in one line.

Command modules import what is heavy inside their functions, so that ``rlkv
--help`` answers at once.
"""

import sys
from typing import Annotated

import typer

import rlkv_vllm
from rlkv_vllm.cli.bench import bench
from rlkv_vllm.cli.compare import compare
from rlkv_vllm.cli.doctor import doctor
from rlkv_vllm.cli.evaluate import evaluate
from rlkv_vllm.cli.profile import app as profile_app
from rlkv_vllm.cli.refine import refine
from rlkv_vllm.cli.score import score
from rlkv_vllm.cli.serve import serve
from rlkv_vllm.cli.testbed import app as testbed_app
from rlkv_vllm.cli.train import train

app = typer.Typer(
    name="rlkv",
    help="Serve reasoning models from stock vLLM with a per-head split KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlkv-vllm {rlkv_vllm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_print_version, is_eager=True, help="Print version."
        ),
    ] = False,
) -> None:
    del version  # handled by its callback


# Its flags are vLLM's: nothing is parsed here, not even --help.
app.command(
    "serve",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(serve)
app.add_typer(profile_app, name="profile")
app.add_typer(testbed_app, name="testbed")
app.command("score")(score)
app.command("refine")(refine)
app.command("train")(train)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("bench")(bench)
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    from importlib.util import find_spec

    from rlkv_vllm.errors import INSTALL, RlkvError

    try:
        app(prog_name="rlkv")
    except RlkvError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in INSTALL or find_spec(package):
            raise
        _fail(f"rlkv {sys.argv[1]}: needs {package}, which is not installed: {INSTALL[package]}")
    except ValueError as error:
        from pydantic import ValidationError

        if not isinstance(error, ValidationError):
            raise
        from rlkv_vllm.serving.messages import reason

        _fail(f"{error.title}: {reason(error)}")


def _fail(message: str) -> None:
    from rlkv_vllm.files import printable

    sys.stdout.flush()
    print(f"rlkv: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
