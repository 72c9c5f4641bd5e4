"""The command `serve`."""

from __future__ import annotations

from typing import Any

from onestill.cli.fields import ConfigFile, from_config
from onestill.cli.output import quiet, say
from onestill.core.settings import make
from onestill.pages.config import ServeConfig


@from_config(ServeConfig, positional="student")
def serve(settings: dict[str, Any], config: ConfigFile = None) -> None:
    """Serve a page to play with a student on, for this machine alone; Ctrl-C ends it."""
    made = make(ServeConfig, settings, config)
    from onestill.runs.serve import open_server

    quiet()
    server = open_server(made)
    say((server.address, "bold"), "  (open it in a browser; Ctrl-C ends it)")
    server.run()
