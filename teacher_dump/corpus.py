"""The frozen corpus: every sample tokenised once, in a fixed order, in flat arrays."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage_schemas.errors import DataError
from storage_schemas.rows import EMPTY, INVALID_TEXT, OK, TOO_LONG
from storage_schemas.targets import I32, I64
from teacher_dump.config import CorpusSection
from teacher_dump.kept import cache_folder, corpus_key, kept
from teacher_dump.masks import Tokens, Unusable
from teacher_dump.sources import find_source, open_source, read_source
from teacher_dump.tokenise import NOTHING, Tokenised, tokenise

_BATCH = 256
_ARRAYS = ("offsets", "input_ids", "loss_mask", "lengths")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of the corpus; its arrays share the corpus's memory."""

    sample_index: int
    """Place in the corpus, from 0."""
    sample_id: str
    """The record's `id`, or a hash of its content."""
    status: str
    """`ok`, or why there is nothing to ask the teacher."""
    input_ids: I32
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All samples in flat arrays: sample i owns tokens offsets[i]:offsets[i + 1]."""

    sample_ids: list[str]
    """(samples,) ids are the user's and need not be unique."""
    statuses: list[str]
    """(samples,)"""
    offsets: I64
    """(samples + 1,)"""
    input_ids: I32
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,)"""
    lengths: I64
    """(samples,) tokens of each before it was cut or dropped."""
    source_samples: list[int]
    """Samples of each source, in order."""
    fingerprint: str
    """Hash over every sample's id, status, token ids and loss mask, in order."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def sample(self, index: int) -> Sample:
        """Sample `index`."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        return Sample(
            sample_index=index,
            sample_id=self.sample_ids[index],
            status=self.statuses[index],
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
        )

    def tokens(self, samples: range) -> int:
        """Number of tokens of a range of samples."""
        return int(self.offsets[samples.stop] - self.offsets[samples.start])

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(np.diff(self.offsets).max(initial=0))


def freeze_corpus(
    section: CorpusSection, tokenizer: Any, *, head_size: int, check: Callable[[], None] = lambda: None
) -> Corpus:
    """Read, tokenise and hash every record of every source, or take what an earlier start kept of that.

    Args:
        section: sources, mask and length policy.
        tokenizer: the teacher's fast tokenizer.
        head_size: rows of the teacher's LM head; pre-tokenised ids must be below it.
        check: called often; may raise to stop.

    Raises:
        DataError: a source or a record is not readable, or nothing in the corpus can be used.
        MismatchError: an object store denies access.
        TemporaryError: an object store does not answer.
    """
    found = [find_source(source) for source in section.sources]
    cache = cache_folder(section)

    def make() -> Corpus:
        builder = _Builder(section, head_size=head_size)
        for source, files in zip(section.sources, found, strict=True):
            records = read_source(source, open_source(source, files, seed=section.seed, cache=cache))
            while batch := list(islice(records, _BATCH)):
                check()
                for one in tokenise(batch, tokenizer, mask=section.mask):
                    builder.add(one)
            builder.end_source()
        return builder.corpus()

    key = corpus_key(section, found, tokenizer, head_size=head_size)
    if key is None:
        return make()
    return kept(cache / "corpora", key, load=_load, make=make, save=_save)


def _save(corpus: Corpus, folder: Path) -> None:
    for name in _ARRAYS:
        np.save(folder / f"{name}.npy", getattr(corpus, name))
    rest = {name: getattr(corpus, name) for name in ("sample_ids", "statuses", "source_samples", "fingerprint")}
    rest["lengths_sha256"] = hashlib.sha256(corpus.lengths.tobytes()).hexdigest()
    (folder / "samples.json").write_text(json.dumps(rest), encoding="utf-8")


def _load(folder: Path) -> Corpus:
    """A kept corpus, its arrays mapped from the files; ValueError if its content has another hash than it says."""
    rest = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    lengths = rest.pop("lengths_sha256")
    # Copy on write, as torch wants arrays that it may write to.
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in _ARRAYS}
    corpus = Corpus(**arrays, **rest)
    samples, tokens = len(corpus), len(corpus.input_ids)
    sizes = (len(corpus.statuses), len(corpus.lengths), len(corpus.offsets) - 1, sum(corpus.source_samples))
    digest = hashlib.sha256()
    if {*sizes} == {samples} and corpus.offsets[-1] == tokens == len(corpus.loss_mask):
        for i in range(samples):
            _hash(digest, corpus.sample(i))
    found = (digest.hexdigest(), hashlib.sha256(corpus.lengths.tobytes()).hexdigest())
    if found != (corpus.fingerprint, lengths):
        raise ValueError("its content has another hash")
    return corpus


def _hash(digest: "hashlib._Hash", sample: "Sample") -> None:
    head = json.dumps([sample.sample_id, sample.status, len(sample.input_ids)])
    digest.update(head.encode() + b"\n")
    digest.update(sample.input_ids.astype("<i4").tobytes())
    digest.update(sample.loss_mask.tobytes())


class _Builder:
    """Grows the flat arrays and the fingerprint, sample by sample."""

    def __init__(self, section: CorpusSection, *, head_size: int) -> None:
        self.section, self.head_size = section, head_size
        self.sample_ids: list[str] = []
        self.statuses: list[str] = []
        self.offsets = array("q", [0])
        self.input_ids = array("i")
        self.loss_mask = bytearray()
        self.lengths = array("q")
        self.source_samples: list[int] = []
        self.digest = hashlib.sha256()
        self.first_problem = ""

    def add(self, record: Tokenised) -> None:
        tokens = record.tokens
        self.lengths.append(0 if isinstance(tokens, Unusable) else len(tokens.input_ids))
        status, tokens = self._judge(tokens, where=record.where)
        self.sample_ids.append(record.sample_id.encode(errors="replace").decode())
        self.statuses.append(status)
        self.input_ids.frombytes(tokens.input_ids.tobytes())
        self.loss_mask += tokens.loss_mask.tobytes()
        self.offsets.append(len(self.input_ids))
        index = len(self.statuses) - 1
        _hash(
            self.digest,
            Sample(
                sample_index=index,
                sample_id=self.sample_ids[-1],
                status=status,
                input_ids=tokens.input_ids,
                loss_mask=tokens.loss_mask,
            ),
        )

    def end_source(self) -> None:
        """All samples of a source were added."""
        self.source_samples.append(len(self.statuses) - sum(self.source_samples))

    def corpus(self) -> Corpus:
        counts = Counter(self.statuses)
        if not counts[OK]:
            found = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no records"
            raise DataError(
                "no sample of the corpus can be used",
                got=f"{found} ({self.first_problem})" if self.first_problem else found,
                expected="at least one sample with a supervised token",
                fix="correct corpus.sources, corpus.mask or corpus.max_length",
            )
        return Corpus(
            sample_ids=self.sample_ids,
            statuses=self.statuses,
            offsets=np.frombuffer(self.offsets, np.int64),
            input_ids=np.frombuffer(self.input_ids, np.int32),
            loss_mask=np.frombuffer(self.loss_mask, np.bool_),
            lengths=np.frombuffer(self.lengths, np.int64),
            source_samples=self.source_samples,
            fingerprint=self.digest.hexdigest(),
        )

    def _judge(self, tokens: Tokens | Unusable, *, where: str) -> tuple[str, Tokens]:
        """Status of a sample, and what is kept of it."""
        if isinstance(tokens, Unusable):
            self.first_problem = self.first_problem or f"{where}: {tokens.reason}"
            return INVALID_TEXT, NOTHING
        ids, mask, limit = tokens.input_ids, tokens.loss_mask, self.section.max_length
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.head_size:
            raise DataError(
                f"{where}: a token id is outside of the teacher's vocabulary",
                got=int(ids.min()) if ids.min() < 0 else int(ids.max()),
                expected=f"0 ... {self.head_size - 1}",
                fix="tokenise the corpus with the teacher's tokenizer",
            )
        if len(ids) > limit:
            match self.section.too_long:
                case "drop":
                    return TOO_LONG, NOTHING
                case "truncate":
                    ids, mask = ids[:limit], mask[:limit]
                case "error":
                    raise DataError(
                        f"{where}: the sample is too long",
                        got=f"{len(ids)} tokens",
                        expected=f"at most {limit} (corpus.max_length)",
                        fix="raise corpus.max_length, or set corpus.too_long to truncate or drop",
                    )
        return (OK if mask.any() else EMPTY), Tokens(ids, mask)
