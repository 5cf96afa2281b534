"""A headless Chromium, where the machine has one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)")
_RESULT = re.compile(r'<pre id="found">(.*?)</pre>', re.DOTALL)


def visit(page: Path, script: str, folder: Path, width: int = 1200, dark: bool = False) -> tuple[Any, list[str]]:
    """Open a copy of a page and run a script in it once all has loaded.

    Args:
        page: an HTML file.
        script: the body of a function that returns what JSON can say.
        folder: for the copy and the browser's profile.
        width: of the window.
        dark: whether the person prefers dark pages.

    Returns:
        what the script returned, and what went to the console.
    """
    ending = f"""<script>window.addEventListener("load", () => {{
      const found = document.createElement("pre");
      found.id = "found";
      found.textContent = JSON.stringify((() => {{ {script} }})());
      document.body.append(found);
    }});</script></body>"""
    copy = folder / "copy.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", ending), encoding="utf-8")
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000"]
    options += ["--force-dark-mode"] * dark
    run = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    result = _RESULT.search(run.stdout)
    assert result, run.stdout[-2000:]
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(result[1])), console
