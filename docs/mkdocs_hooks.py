"""Hooks of mkdocs: pages that lie outside of docs/ are part of the site, and links between both lead there.

In the repository a page of docs/ links to `../benchmarks/gpu.md`; on the site it is `benchmarks/gpu.md`.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTSIDE = ("benchmarks/*.md", "benchmarks/*.svg", "SECURITY.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures outside of docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite relative links from where they lead in the repository to where that is on the site."""
    source, folder = Path(page.file.abs_src_path), Path(page.file.src_uri).parent

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[1]))
        place = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT)
        return f"]({Path(os.path.relpath(place, folder)).as_posix()}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)", moved, markdown)
