"""How the pipeline writes its small text files."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old or the new content."""
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(text)
    os.replace(staged, path)
