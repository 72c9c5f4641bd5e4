"""A real browser for tests of pages: Chromium as the machine has it, without a network."""

from __future__ import annotations

import functools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address of a plain static server of a folder, as `python -m http.server` is one."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def opened(place: Path | str, *, width: int = 1200, dark: bool = False) -> Iterator[Any]:
    """Yield a page with a file in it, or what is served at an address, and as `page.heard` what it said in its console
    or asked of elsewhere, which is out of reach.

    Skips the test where there is no Chromium, unless CI says that there is one.
    """
    if CHROMIUM is None:
        if os.environ.get("ONESTILL_HAS_CHROMIUM"):
            pytest.fail("ONESTILL_HAS_CHROMIUM is set, and there is no Chromium")
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    heard: list[str] = []
    own = place if isinstance(place, str) else "file:"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            offline=isinstance(place, Path),
        )
        if isinstance(place, str):
            context.route(lambda url: not url.startswith((place, "data:", "blob:")), lambda route: route.abort())
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        elsewhere = re.compile(rf"(?!{re.escape(own)}/|data:|blob:|file:)")
        page.on("request", lambda request: heard.append(request.url) if elsewhere.match(request.url) else None)
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.goto(place.as_uri() if isinstance(place, Path) else place)
        page.heard = heard
        yield page
        browser.close()
