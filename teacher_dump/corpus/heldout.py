"""Whether held-out samples are really held out: what a corpus and another one share, by the content of samples."""

import logging

import numpy as np
import numpy.typing as npt

from storage_schemas.common.errors import DataError
from storage_schemas.rows import OK
from teacher_dump.corpus.freeze import Corpus

log = logging.getLogger(__name__)

_STRIDE = 2**16


def refuse_shared(corpus: Corpus, heldout: Corpus) -> None:
    """Warn of usable held-out samples whose token ids a usable sample of the corpus has, too.

    Raises:
        DataError: each of the two holds all that the other holds.
    """
    theirs = {_body(heldout, i) for i in np.flatnonzero(heldout.have(OK)).tolist()}
    usable = corpus.have(OK)
    # Sums first: no loop over the samples of a large corpus.
    likely = np.flatnonzero(np.isin(_sums(corpus), _sums(heldout)) & usable).tolist()
    shared = [body for body in (_body(corpus, i) for i in likely) if body in theirs]
    bodies = set(shared)
    if not bodies:
        return
    if len(shared) == np.count_nonzero(usable) and len(bodies) == len(theirs):
        raise DataError(
            "the held-out samples are the training corpus",
            got=f"the same {len(bodies)} samples in both",
            expected="held-out samples that the student is not trained on",
            fix="correct heldout.sources, or split the data (split: train[:95%] and train[95%:])",
        )
    log.warning("%d of %d different held-out samples are in the training corpus, too", len(bodies), len(theirs))


def _body(corpus: Corpus, index: int) -> bytes:
    return corpus.input_ids[corpus.offsets[index] : corpus.offsets[index + 1]].tobytes()


def _sums(corpus: Corpus) -> npt.NDArray[np.uint64]:
    """(samples,) a number per sample that equal samples have in common, and hardly any others."""
    sums = np.zeros(len(corpus), np.uint64)
    for start in range(0, len(corpus), _STRIDE):
        offsets = corpus.offsets[start : start + _STRIDE + 1]
        mixed = (corpus.input_ids[offsets[0] : offsets[-1]].astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
        mixed = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed ^ (mixed >> np.uint64(29)), dtype=np.uint64)])
        ends = mixed[offsets - offsets[0]]
        sums[start : start + _STRIDE] = ends[1:] - ends[:-1]
    return sums
