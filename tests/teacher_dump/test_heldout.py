"""Held-out samples that are not held out."""

import json

import datasets
import pytest
from support.tiny_teachers import CHATML, VOCABULARY, tiny_tokenizer

from storage_schemas.common.errors import DataError
from teacher_dump.config import CorpusSection, SourceSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.corpus.heldout import refuse_shared

TEXTS = ["what is it", "the answer is so", "how", "so what", "it is", "", "is it so"]


@pytest.fixture
def freeze(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(texts, **more):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
        section = CorpusSection(sources=[SourceSection(path=str(path))], cache_dir=str(tmp_path / "neo"))
        return freeze_corpus(section, tiny_tokenizer(CHATML), lm_head_rows=VOCABULARY)

    return make


def test_the_training_corpus_in_another_order_with_other_ids_is_refused(freeze):
    for other in (TEXTS, [*reversed(TEXTS), "how"]):
        with pytest.raises(DataError, match=r"training corpus(.|\n)*same 6 samples"):
            refuse_shared(freeze(TEXTS), freeze(other, id="x"))


def test_an_overlap_is_counted_and_none_is_silent(freeze, caplog):
    refuse_shared(freeze(TEXTS), freeze(["it so is", "and the other"]))
    assert "held-out" not in caplog.text, "the same words in another order are another sample"
    refuse_shared(freeze(TEXTS), freeze(["how", "how", "it is", "and the other"]))
    assert "2 of 3 different held-out samples are in the training corpus" in caplog.text
