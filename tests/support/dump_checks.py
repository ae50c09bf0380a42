"""A small corpus, the sections of a dump of it, and what must hold for the result."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from storage_schemas.config import DumpSection, TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection

SAMPLES = 11
PER_UNIT = 3
UNITS = 4
WORDS = [
    "what",
    "is",
    "the",
    "answer",
    "to",
    "that",
    "question",
    "and",
    "how",
    "many",
    "of",
    "them",
    "are",
    "there",
    "in",
    "all",
]


def write_corpus(path: Path) -> Path:
    """Eleven samples of many lengths; number 5 has nothing to learn from, and number 7 is too long."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(SAMPLES):
            question, answer = (" ".join(rng.choice(WORDS, rng.integers(1, n))) for n in (6, 9))
            answer = {5: None, 7: " ".join(WORDS * 9)}.get(i, answer)
            turns = [{"role": "user", "content": question}]
            if answer is not None:
                turns.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"id": f"s{i}", "messages": turns}) + "\n")
    return path


def sections(
    url: Path | str, corpus_file: Path, model_folder: Path, *, batch_tokens: int = 200, **dump: Any
) -> dict[str, Any]:
    """Arguments of `run_dump`."""
    return {
        "dump": DumpSection(url=str(url), **({"samples_per_unit": PER_UNIT} | dump)),
        "teacher": TeacherSection(model=str(model_folder), dtype="float32", device="cpu", batch_tokens=batch_tokens),
        "corpus": CorpusSection(sources=[SourceSection(path=str(corpus_file))], max_length=96, too_long="drop"),
        "estimator": TopK(k=8),
    }


def vllm_sections(
    url: Path | str, corpus_file: Path, model_folder: Path, *, k: int = 8, mass: float = 0.9, **teacher: Any
) -> dict[str, Any]:
    """The same with vLLM. Of 96 places one is for the token that it generates."""
    job = sections(url, corpus_file, model_folder, logsumexp=False, logprob_step=0.0)
    options = job["teacher"].model_dump() | {"backend": "vllm", "vllm": {}} | teacher
    corpus = job["corpus"].model_copy(update={"max_length": 95})
    return job | {"teacher": TeacherSection(**options), "corpus": corpus, "estimator": TopK(k=k, mass=mass)}


def rows_of(url: Path | str) -> list[Row]:
    """All rows of a sealed dump, in order; every checksum verified."""
    found = Dump.open(str(url))
    assert found.is_sealed()
    units = [found.read_unit(unit) for unit in sorted(found.read_records())]
    return [row for unit in units for row in unit]


def assert_each_sample_once(url: Path | str) -> None:
    assert [row.sample_index for row in rows_of(url)] == list(range(SAMPLES))
    assert sorted(Dump.open(str(url)).read_records()) == list(range(UNITS))


def files_of(folder: Path | str) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*") if path.is_file()}
