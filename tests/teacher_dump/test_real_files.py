"""Real corpora, whole and spoilt in every way that real files are; a dump of the spoilt one is complete and proven.

Larger corpora are looked for in `$LLM_NEO_DATA`, or in `shared/data` beside the checkout.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import freeze as freeze_sources
from support.corpora import statuses_of
from support.dump_checks import rows_of
from support.tiny_teachers import CHATML, VOCABULARY, save_teacher, tiny_tokenizer

from storage_schemas.config import DumpSection, TopK
from storage_schemas.verify import verify
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.freeze import Corpus
from teacher_dump.dump import run_dump

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "benchmarks" / "data" / "gsm8k_150.jsonl"
LARGER = Path(os.environ.get("LLM_NEO_DATA") or ROOT.parent / "shared" / "data")
SMOLLM = ROOT / "models" / "SmolLM2-135M-Instruct"


def freeze(path: Path, **options: Any) -> Corpus:
    return freeze_sources(path, **{"max_length": 200_000, "max_bad_share": 0.1} | options)


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def answers(record: dict) -> str:
    if "output" in record:
        return record["output"] + "<|im_end|>" if record["output"] else ""
    return "".join(m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant")


@pytest.mark.parametrize(
    ("name", "samples", "empty"),
    [
        ("", 150, 0),
        ("gsm8k_validation.jsonl", 473, 0),
        ("self_instruct_seed_alpaca.jsonl", 175, 0),
        pytest.param("gsm8k_train.jsonl", 3000, 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("real_tokenizer", [False, True])
def test_every_answer_of_a_real_corpus_is_supervised(name: str, samples: int, empty: int, real_tokenizer: bool) -> None:
    path = LARGER / name if name else SHIPPED
    if not path.is_file():
        pytest.skip(f"no {path}; set LLM_NEO_DATA to a folder with it")
    tokenizer, lm_head_rows = tiny_tokenizer(CHATML), VOCABULARY
    if real_tokenizer:
        if not SMOLLM.is_dir():
            pytest.skip(f"no {SMOLLM}; `make demo` makes it")
        from transformers import AutoTokenizer

        tokenizer, lm_head_rows = AutoTokenizer.from_pretrained(SMOLLM), 49_152
    corpus = freeze(path, tokenizer=tokenizer, lm_head_rows=lm_head_rows)
    assert len(corpus) == samples
    assert corpus.status_counts().get("empty", 0) == empty
    assert corpus.status_counts().get("ok", 0) == samples - empty
    for i, record in enumerate(records_of(path)):
        sample = corpus.sample(i)
        # A BPE tokenizer may join the line end of the header with one that the answer begins with.
        assert tokenizer.decode(sample.input_ids[sample.loss_mask]).lstrip("\n") == answers(record).lstrip("\n")


@pytest.fixture
def spoilt(tmp_path: Path) -> tuple[Path, list[str]]:
    """The shipped corpus with bad records among the good ones; and what becomes of each record."""
    lines = SHIPPED.read_bytes().splitlines()[:40]
    question, answer = (m["content"] for m in json.loads(lines[0])["messages"])
    everything = "\n\n".join(answers(record) for record in records_of(SHIPPED)) * 3
    bad = {
        3: (lines[2], "ok"),  # A duplicate.
        7: (json.dumps({"messages": [{"role": "user", "content": question}]}).encode(), "empty"),
        11: (b'{"messages": []}', "empty"),
        13: (json.dumps({"messages": [{"role": "user", "content": question},
                                      {"role": "assistant", "content": ""}]}).encode(), "ok"),
        17: (lines[4].replace(b'"assistant", "content": "', b'"assistant", "content": "caf\xe9 '), "invalid_text"),
        19: (json.dumps({"messages": [{"role": "user", "content": question},
                                      {"role": "assistant", "content": everything}]}).encode(), "ok"),
        23: (json.dumps({"messages": [{"role": "user", "content": "\ud83d " + question},
                                      {"role": "assistant", "content": answer}]}).encode(), "invalid_text"),
        29: (lines[2], "ok"),
        31: (json.dumps({"messages": [{"role": "system", "content": ""}]}).encode(), "empty"),
    }  # fmt: skip
    statuses = []
    path = tmp_path / "spoilt.jsonl"
    with path.open("wb") as file:
        for i, line in enumerate(lines):
            for content, status in [bad[i]] if i in bad else []:
                file.write(content + b"\n")
                statuses.append(status)
            file.write(line + b"\n\n")
            statuses.append("ok")
    return path, statuses


def test_bad_records_are_marked_and_leave_the_others_alone(spoilt: tuple[Path, list[str]]) -> None:
    path, statuses = spoilt
    corpus, clean = freeze(path), freeze(SHIPPED)
    assert statuses_of(corpus) == statuses
    assert corpus.longest > 100_000
    good = [i for i, status in enumerate(statuses_of(corpus)) if status == "ok"]
    bodies = {corpus.sample(i).input_ids.tobytes() for i in good}
    for i in range(40):
        assert clean.sample(i).input_ids.tobytes() in bodies
    third = [i for i in good if corpus.sample(i).input_ids.tobytes() == clean.sample(2).input_ids.tobytes()]
    assert len(third) == 3, "duplicates are samples like any other"
    assert len({corpus.sample(i).sample_id for i in third}) == 1
    for i in third:
        np.testing.assert_array_equal(corpus.sample(i).loss_mask, clean.sample(2).loss_mask)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_a_dump_of_it_has_every_sample_and_is_proven(
    tmp_path: Path, spoilt: tuple[Path, list[str]], too_long: str
) -> None:
    path, statuses = spoilt
    limit = 900
    long = freeze(path).lengths > limit
    assert 0 < long.sum() < 5
    url = str(tmp_path / "dump")
    teacher = save_teacher(tmp_path / "teacher", max_position_embeddings=1024)
    summary = run_dump(
        dump=DumpSection(url=url, samples_per_unit=16),
        teacher=TeacherSection(model=str(teacher), dtype="float32", device="cpu"),
        corpus=CorpusSection(
            sources=[SourceSection(path=str(path))], max_length=limit, too_long=too_long, max_bad_share=0.1
        ),
        estimator=TopK(k=4),
    )
    rows = rows_of(tmp_path / "dump")
    expected = [
        "too_long" if cut and too_long == "drop" and status == "ok" else status
        for status, cut in zip(statuses, long, strict=True)
    ]
    assert [row.status for row in rows] == expected
    assert summary.rows == len(statuses)
    assert max(len(row.input_ids) for row in rows) <= limit
    for row in rows:
        assert (row.targets is not None) == (row.status == "ok")
    report = verify(url)
    assert report.ok, report.errors
