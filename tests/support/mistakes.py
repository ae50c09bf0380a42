"""`llm-neo` in forks of one process, so that a command costs what it does and not its imports; and where they run.

The ranks of a training run in the fork as well, in place of processes of their own.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import peft  # noqa: F401
from support.forks import serve
from support.tiny_student import save_student
from support.tiny_teachers import save_teacher

import student_train.results.evaluate
import student_train.train
import teacher_dump.dump  # noqa: F401
from pipeline import cli, processes
from pipeline.prune import prune
from student_train import worker

CONFIG = """dump: {url: d, samples_per_unit: 4}
teacher: {model: teacher, dtype: float32, device: cpu}
estimator: {kind: topk, k: 8}
corpus: {sources: [{path: a.jsonl}], max_length: 96}
heldout: {url: h, sources: [{path: h.jsonl}]}
student: {model: student, lora: {r: 4}}
train: {output: run, zero_stage: 1, precision: fp32, global_batch_size: 4, micro_batch_size: 2, learning_rate: 0.01}
"""
FILES = {
    "x.yaml": CONFIG,
    "placed.yaml": CONFIG.replace("output: run,", "output: runs/a,"),
    "link.yaml": "x.yaml",
    "tab.yaml": "dump:\n\turl: x\n",
    "twice.yaml": "dump: {url: a}\ndump: {url: b}\n",
    "list.yaml": "- a\n",
    "empty.yaml": "",
    "colon.yaml": "dump: {url: d}\nteacher:\n  model: a: b\n",
    "indent.yaml": "dump:\n  url: x\n teacher: y\n",
    "bracket.yaml": "dump: {url: d\n",
    "ds.json": '{"train_batch_size": 7}',
    "torn.json": '{"train_batch_size": ',
    "torn.jsonl": '{"messages": [}\n',
    "none.jsonl": "",
    "columns.jsonl": '{"foo": 1}\n' * 3,
    "a.csv": "a,b\n1,2\n",
    "semicolons.csv": "a;b\n1;2\n",
    "roles.jsonl": '{"messages": [{"role": "agent", "content": "a"}]}\n',
    "a.pdf": "no text",
}


def make(folder: Path) -> None:
    """Models, corpora, a dump of each, a run that is done, and what is wrong with copies of them."""
    os.chdir(folder)
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name, samples in (("a", range(12)), ("h", range(100, 106))):
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(_chat(i))}\n" for i in samples))
    save_teacher(Path("teacher"), num_hidden_layers=3)
    save_teacher(Path("base"), template=None)
    prune("teacher", Path("student"), layers=2)
    save_student(Path("foreign"))
    for words in (["dump", "x.yaml"], ["train", "x.yaml"]):
        assert command(words) == 0
    unit = sorted(Path(shutil.copytree("d", "damaged"), "data").iterdir())[1]
    unit.write_bytes(unit.read_bytes()[:-1])
    shutil.copytree("d", "unsealed")
    Path("unsealed/SEALED.json").unlink()
    sorted(Path("unsealed/commits").iterdir())[-1].unlink()
    shutil.copytree("run/final", "moved")
    Path("moved/llm-neo.json").unlink()
    _rewrite(Path("moved/adapter_config.json"), base_model_name_or_path="/gone/model")
    shutil.copytree("student", "weightless")
    Path("weightless/model.safetensors").unlink()
    shutil.copytree("teacher", "torn")
    Path("torn/model.safetensors").write_bytes(b"xx")


def command(words: Sequence[str]) -> int:
    """Exit code of `llm-neo` with these words."""
    try:
        cli.main(list(words))
    except SystemExit as left:
        return int(left.code or 0)


def _chat(number: int) -> dict[str, Any]:
    said = f"what is the answer to question {number}", f"the answer is {number * 7} and how is the other one {number}"
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    }


def _rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rank(module: str, arguments: Sequence[str], **_: object) -> int:
    assert module == "student_train.worker"
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return worker.main([*arguments, "--rendezvous", f"file://{Path(arguments[-1]).parent}/ranks"])


def work(job: dict[str, Any]) -> int:
    """One job: `make` a folder, or run `words` in it; what is printed goes to the file `out`."""
    with Path(job["out"]).open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    processes.run_ranks = _rank
    os.chdir(job["folder"])
    if "words" in job:
        return command(job["words"])
    make(Path(job["folder"]))
    return 0


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    assert student_train.results.evaluate
    assert student_train.train
    print("ready", file=sys.stderr)
    serve(work)
