"""The command line: parse, call, print."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from onestill import __version__
from onestill.cli import compare, demo, distill, evaluate, export, inspect, sample, serve
from onestill.cli.fields import ALIASES
from onestill.cli.guesses import meant
from onestill.cli.help import Command
from onestill.cli.output import note, say
from onestill.core.errors import FoundWarning, RunError, as_flags, in_short, shown_as_flags
from onestill.core.memory import is_out_of_memory

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # which typer has under no public name
# Flags have underscores, as in diffusers' scripts; dashes mean the same.
LONGEST_LINE = 400
CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "help_option_names": ["-h", "--help"]}
_USUAL = warnings.showwarning


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
    compare.compare,
    export.export,
    serve.serve,
    demo.demo,
):
    app.command(cls=Command)(command)


def main() -> None:
    """Run the command line; bad input ends with one clear line and exit code 2."""
    warnings.showwarning = _show
    try:
        code = app(standalone_mode=False)  # typer would draw a box around its errors
    except UsageError as error:
        _end(_usage(error), 2)  # nothing to say: the help was shown, for want of a command
    except ValueError as error:
        _end(shown_as_flags(error), 2)
    except RunError as error:
        _end(shown_as_flags(error), 1)
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)
    except Exception as error:
        if is_out_of_memory(error):
            _end(f"there is not enough memory: {in_short(error)}", 1)
        if not isinstance(error, OSError):
            raise
        # Of a file that was not asked for by name, such as one inside a folder.
        _end(f"{error.filename or 'the system'}: {(error.strerror or in_short(error)).lower()}", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Show a warning: of ours in one line, of others as Python does."""
    if isinstance(message, FoundWarning):
        note(("warning:", "yellow"), f" {as_flags(message.text)}")
    else:
        _USUAL(message, category, filename, lineno, file, line)


def _end(words: str, code: int) -> NoReturn:
    """Say what is wrong, a line for each thing, with flags spelt as they were typed, and exit."""
    for line in words.splitlines():
        note(("error:", "red"), f" {_as_typed(line)}")
    sys.exit(code)


def _as_typed(words: str) -> str:
    typed = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in sys.argv if word[:2] == "--"}
    for name, others in ALIASES.items():
        if f"--{name}" not in typed and (used := [other for other in others if other in typed]):
            words = re.sub(rf"--{name}\b", used[0], words)
    return words


def _usage(error: Any) -> str:
    """Return a mistake in a command line in one line: in the words of the parser, naming the flag first."""
    near = ""
    if option := getattr(error, "option_name", ""):
        has = error.ctx.command.params if error.ctx is not None else ()
        near = meant(option, [name for parameter in has for name in (*parameter.opts, *parameter.secondary_opts)])
    words = " ".join((error.message if option else error.format_message()).split()).rstrip(".")
    if value := re.match(r"Invalid value for '(--\w+)'.*?: (?:Value error, )?(.*)", words):
        return f"{value[1]}: {value[2][:1].lower()}{value[2][1:]}"
    words = words if len(words) <= LONGEST_LINE else f"{words[:LONGEST_LINE]}..."
    return words[:1].lower() + words[1:] + (f"; did you mean {near}?" if near else "")


def _version(show: bool) -> None:
    if show:
        say(f"onestill {__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None:
    """One-step generators from pre-trained diffusion models, without a training image."""
