"""What commands print: results to standard output, all else to standard error."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.text import Text

from onestill.core.errors import as_flags

out, err = Console(), Console(stderr=True)


def say(*parts: str | tuple[str, str], to: Console = out) -> None:
    """Print one line as it is: not wrapped, and nothing in it read as markup. A part is words, or (words, style).

    Settings that the words mention are spelt as flags.
    """
    flagged = [as_flags(part) if isinstance(part, str) else (as_flags(part[0]), part[1]) for part in parts]
    to.print(Text.assemble(*flagged), soft_wrap=True)


def note(*parts: str | tuple[str, str]) -> None:
    """Print such a line to standard error."""
    say(*parts, to=err)


def quiet() -> None:
    """Keep the libraries' own progress bars and notices out of the output; errors stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for theirs in (diffusers_logging, transformers_logging):
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
    # A hub that does not answer is asked again and again, each time with a line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
