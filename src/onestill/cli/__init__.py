"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onestill import __version__
from onestill.cli import demo, distill, evaluate, export, inspect, sample
from onestill.cli.help import Command
from onestill.cli.output import note, say

# Flags have underscores, as in diffusers' scripts; dashes mean the same.
CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """The commands. Ctrl-C ends each with one line and exit code 130; typer alone would say nothing."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a KeyboardInterrupt may carry what to say."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            note(str(stop) or "stopped")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    help="One-step generators from pre-trained diffusion models, without a training image.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order of the help.
for command in (
    distill.distill,
    inspect.inspect,
    sample.sample,
    evaluate.evaluate,
    export.export,
    demo.demo,
):
    app.command(cls=Command)(command)


def main() -> None:
    """Run the command line; bad input ends with one clear line and exit code 2."""
    try:
        app()
    except ValueError as error:
        for line in str(error).splitlines():
            note(("error:", "red"), f" {line}")
        sys.exit(2)
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


def _version(show: bool) -> None:
    if show:
        say(f"onestill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One-step generators from pre-trained diffusion models, without a training image."""
