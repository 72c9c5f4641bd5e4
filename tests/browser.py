"""A real browser for tests of pages: Chromium as the machine has it, without a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def opened(path: Path, *, width: int = 1200, dark: bool = False) -> Iterator[Any]:
    """Yield a page with a file in it, and what it asked of elsewhere or said in its console as `page.heard`.

    Skips the test where there is no Chromium, unless CI says that there is one.
    """
    if CHROMIUM is None:
        if os.environ.get("ONESTILL_HAS_CHROMIUM"):
            pytest.fail("ONESTILL_HAS_CHROMIUM is set, and there is no Chromium")
        pytest.skip("there is no Chromium")
    from playwright.sync_api import sync_playwright

    heard: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True
        )
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.goto(path.as_uri())
        page.heard = heard
        yield page
        browser.close()
