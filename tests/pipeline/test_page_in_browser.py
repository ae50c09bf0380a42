"""The page of `inspect --html` in a real browser: nothing is wider than the window, on a phone neither.

Skipped where there is no Chromium; nothing else needs one.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_inspect import make, tokenizer

from pipeline.views import page

__all__ = ["tokenizer"]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BROWSER = os.environ.get("CHROMIUM") or next((name for name in NAMES if shutil.which(name)), None)
WIDTHS = (390, 768, 1280)
FRAME = '<iframe srcdoc="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>'
MEASURE = """
<pre></pre>
<script>
onload = () => document.querySelector("pre").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(
  frame => {
    const inside = frame.contentDocument, width = frame.contentWindow.innerWidth;
    const beyond = [...inside.body.querySelectorAll("*")].filter(e => e.getBoundingClientRect().right > width + 0.5);
    const clipped = [...inside.body.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1
      && getComputedStyle(e).display != "inline");
    const shown = getComputedStyle(inside.querySelector(".tokens thead")).display != "none";
    return {width: width, scroll: inside.documentElement.scrollWidth, beyond: beyond.map(e => e.outerHTML.slice(0, 80)),
            clipped: clipped.map(e => e.outerHTML.slice(0, 80)), table: shown};
  }));
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is here (CHROMIUM=/path/to/it names another one)")
def test_nothing_is_wider_than_the_window(tmp_path: Path, tokenizer) -> None:
    shown = html.escape(page.page(make(tmp_path / ("long-name-" * 20), tokenizer), [0, 1, 2, 3]))
    frames = "".join(FRAME.format(page=shown, width=width) for width in WIDTHS)
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frames}{MEASURE}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path / 'frames.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    frames_found = json.loads(html.unescape(found[1]))
    assert [frame["width"] for frame in frames_found] == list(WIDTHS)
    for frame in frames_found:
        assert frame["scroll"] <= frame["width"], frame
        assert not frame["beyond"], frame
        assert not frame["clipped"], frame
    assert [frame["table"] for frame in frames_found] == [False, False, True]
