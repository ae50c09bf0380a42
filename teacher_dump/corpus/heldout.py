"""Whether held-out samples are really held out: what a corpus and another one share, by the content of samples."""

import logging

import numpy as np
import numpy.typing as npt

from storage_schemas.common.errors import DataError
from storage_schemas.rows import OK
from teacher_dump.corpus.freeze import Corpus

log = logging.getLogger(__name__)

_PROBED = 8


def refuse_shared(corpus: Corpus, heldout: Corpus) -> None:
    """Warn of usable held-out samples whose token ids a usable sample of the corpus has, too.

    Raises:
        DataError: all of them are in the corpus.
    """
    theirs = {_body(heldout, i) for i in np.flatnonzero(heldout.have(OK)).tolist()}
    usable = corpus.have(OK)
    # Numbers first: no loop over the samples of a large corpus.
    likely = np.flatnonzero(np.isin(_probes(corpus), _probes(heldout)) & usable).tolist()
    bodies = {body for body in (_body(corpus, i) for i in likely) if body in theirs}
    if not bodies:
        return
    if len(bodies) == len(theirs):
        raise DataError(
            "the held-out samples are in the training corpus",
            got=f"all {len(bodies)} of them",
            expected="held-out samples that the student is not trained on",
            fix="correct heldout.sources, or split the data (split: train[:95%] and train[95%:])",
        )
    log.warning(
        "%d of %d different held-out samples are in the training corpus, too: take them out of one of the two",
        len(bodies), len(theirs),
    )  # fmt: skip


def _body(corpus: Corpus, index: int) -> bytes:
    return corpus.input_ids[corpus.offsets[index] : corpus.offsets[index + 1]].tobytes()


def _probes(corpus: Corpus) -> npt.NDArray[np.uint64]:
    """(samples,) a number per sample that equal samples have in common, and few others: of its length and of `_PROBED`
    tokens in its middle. Every worker makes them at every start, so they are not of all tokens of a large corpus."""
    starts, stops = corpus.offsets[:-1], corpus.offsets[1:]
    found = (stops - starts).astype(np.uint64)
    for step in range(_PROBED if len(corpus.input_ids) else 0):
        places = np.clip((starts + stops) // 2 + step, 0, stops - 1)  # Of an empty sample it does not matter.
        found = (found ^ corpus.input_ids[np.maximum(places, 0)].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found
