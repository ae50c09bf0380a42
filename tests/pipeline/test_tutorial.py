"""docs/tutorial.md: its commands work, in its order, and print what it quotes."""

import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.corpora import write_questions
from support.tiny_teachers import save_teacher

from pipeline import cli
from storage_schemas.config import Sampled, TopK
from storage_schemas.reader import Dump

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
_LINES = re.compile("[\u2500-\u257f]+")
_NUMBER = re.compile(r"\b(?:[0-9a-f]{16,}|\d[\d,.:]*(?:e[-+]\d+)?(?: [kMG]B)?)|-(?=\d)")


def shape(line: str) -> str:
    """A line of output without its numbers, hashes, table borders and widths."""
    return " ".join(_NUMBER.sub("N", _LINES.sub(" ", line)).split())


def missing(quoted: str, printed: str) -> list[str]:
    """Lines of the page that no line of the output looks like; `...` in them stands for anything."""
    there = [shape(line) for line in printed.splitlines()]
    patterns = {line: ".*".join(map(re.escape, shape(line).split("..."))) for line in quoted.splitlines()}
    return [line for line, one in patterns.items() if not any(re.fullmatch(one, seen) for seen in there)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the reader has after `git clone` and `hf download`, but tiny."""
    save_teacher(tmp_path / "models" / "teacher", num_hidden_layers=30, max_position_embeddings=2048)
    questions = write_questions(tmp_path / "benchmarks" / "data" / "gsm8k_150.jsonl", range(149))
    first, _ = (ROOT / "benchmarks" / "data" / "gsm8k_150.jsonl").read_text().split("\n", 1)
    questions.write_text(f"{first}\n{questions.read_text()}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(line: str) -> None:
    """A line of the page: `llm-neo` in this process, anything else in a shell."""
    words = shlex.split(line, comments=True)
    if words[0] != "llm-neo":
        subprocess.run(["bash", "-ec", line], check=True)
        return
    with pytest.raises(SystemExit) as left:
        cli.main(words[1:])
    assert left.value.code == 0, line


def test_the_commands_print_what_the_page_quotes(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    cross_entropy, typed = [], set()
    for language, body, quoted in _BLOCK.findall(PAGE):
        if language == "python":
            exec(compile(body, "docs/tutorial.md", "exec"), {})
        else:
            for line in body.replace("\\\n", " ").splitlines():
                run(line)
                typed.add(" ".join(line.split()[:2]))
        printed = "".join(capfd.readouterr())
        assert not missing(quoted, printed), f"{body}\n{printed}"
        cross_entropy += re.findall(r"^│ cross-entropy, nats +│ +([\d.]+) │$", printed, re.MULTILINE)
    commands = "prune init preview plan dump verify inspect evaluate train status chat merge"
    assert typed >= {f"llm-neo {command}" for command in commands.split()}
    before, after = map(float, cross_entropy)
    assert after < before
    stored = [Dump.open(f"runs/own/{name}").provenance.estimator for name in ("dump", "dump-heldout")]
    assert stored == [Sampled(kind="sampled", draws=50), TopK()]
