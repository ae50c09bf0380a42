"""Held-out samples that are not held out."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.corpora import freeze, write_jsonl

from storage_schemas.common.errors import DataError
from teacher_dump.corpus.freeze import Corpus
from teacher_dump.corpus.heldout import refuse_shared

pytestmark = pytest.mark.usefixtures("own_cache")

TEXTS = ["what is it", "the answer is so", "how", "so what", "it is", "", "is it so"]


@pytest.fixture
def frozen(tmp_path: Path) -> Callable[..., Corpus]:
    """A corpus of texts, each with some more columns."""

    def make(texts: list[str], **more: str) -> Corpus:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        return freeze(write_jsonl(path, ({"text": text, **more} for text in texts)))

    return make


def test_held_out_samples_that_are_all_in_the_corpus_are_refused(frozen: Callable[..., Corpus]) -> None:
    """In another order, with other ids, or a part of it."""
    for other in (TEXTS, [*reversed(TEXTS), "how"]):
        with pytest.raises(DataError, match=r"training corpus(.|\n)*all 6 of them"):
            refuse_shared(frozen(TEXTS), frozen(other, id="x"))
    with pytest.raises(DataError, match=r"training corpus(.|\n)*all 2 of them"):
        refuse_shared(frozen(TEXTS), frozen(TEXTS[1:3]))


def test_an_overlap_is_counted_and_none_is_silent(
    frozen: Callable[..., Corpus], caplog: pytest.LogCaptureFixture
) -> None:
    refuse_shared(frozen(TEXTS), frozen(["it so is", "and the other"]))
    assert "held-out" not in caplog.text, "the same words in another order are another sample"
    refuse_shared(frozen(TEXTS), frozen(["how", "how", "it is", "and the other"]))
    assert "2 of 3 different held-out samples are in the training corpus" in caplog.text
