"""The pages of `inspect --html` and `report --html` in a real browser: on a phone too, they fit and need nothing else.

Skipped where there is no Chromium; nothing else needs one.
"""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.tiny_student import save_student, write_dump
from test_inspect import make, tokenizer
from test_report import finished

from pipeline.views import page
from pipeline.views.run_page import run_page, samples_of
from pipeline.views.runs import read_run
from storage_schemas.config import TopK
from storage_schemas.reader import Dump
from student_train.results.evaluate import evaluate

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
    const all = [...inside.body.querySelectorAll("*")];
    const scrolls = e => getComputedStyle(e).overflowX == "auto";
    const within = e => e != inside.body && (scrolls(e) || within(e.parentElement));
    const beyond = all.filter(e => e.getBoundingClientRect().right > width + 0.5 && !within(e.parentElement));
    const clipped = all.filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != "inline"
      && !scrolls(e) && !e.closest("svg"));
    const head = inside.querySelector(".tokens thead");
    return {width: width, scroll: inside.documentElement.scrollWidth, beyond: beyond.map(e => e.outerHTML.slice(0, 80)),
            clipped: clipped.map(e => e.outerHTML.slice(0, 80)),
            table: head && getComputedStyle(head).display != "none",
            fetched: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
            figures: [...inside.querySelectorAll("svg")].map(e => e.getBoundingClientRect())
              .filter(e => e.height > 100 && e.width > 300).length};
  }));
</script>
"""


pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is here (CHROMIUM=/path/to/it names another one)")


def opened(shown: str, folder: Path) -> list[dict[str, Any]]:
    """What a browser makes of a page, in a window of each width; nothing is wider than the window."""
    frames = "".join(FRAME.format(page=html.escape(shown), width=width) for width in WIDTHS)
    (folder / "frames.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frames}{MEASURE}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{folder / 'frames.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    answer = re.search("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert answer, done.stdout[-500:] + done.stderr[-500:]
    found: list[dict[str, Any]] = json.loads(html.unescape(answer[1]))
    assert [frame["width"] for frame in found] == list(WIDTHS)
    for frame in found:
        assert frame["scroll"] <= frame["width"], frame
        assert not frame["beyond"], frame
        assert not frame["clipped"], frame
        assert not frame["fetched"], frame
    return found


def test_tokens_of_a_dump(tmp_path: Path, tokenizer) -> None:
    found = opened(page.page(make(tmp_path / ("long-name-" * 20), tokenizer), [0, 1, 2, 3]), tmp_path)
    assert [frame["table"] for frame in found] == [False, False, True]


def test_runs_side_by_side(tmp_path: Path) -> None:
    write_dump(tmp_path / "heldout", estimator=TopK(k=8, mass=1.0))
    folders = [finished(tmp_path / name, kl=1.5) for name in ("a", "long-name-" * 20)]
    save_student(tmp_path / "student")
    samples = samples_of(evaluate(tmp_path / "student", Dump.open(str(tmp_path / "heldout")), limit=2))
    shown = run_page([read_run(folder) for folder in folders], samples, heldout="held-out/" * 20)
    assert [frame["figures"] for frame in opened(shown, tmp_path)] == [4, 4, 4]
