"""The frozen corpus: every sample tokenised once, in a fixed order, in flat arrays that are mapped from files."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage_schemas.common.devices import usable_cores
from storage_schemas.common.errors import DataError
from storage_schemas.rows import EMPTY, INVALID_TEXT, OK, STATUSES, TOO_LONG, Row
from storage_schemas.targets import I32, I64
from teacher_dump.config import CorpusSection
from teacher_dump.corpus.cache import cache_folder, corpus_key, is_looked_up, kept, why_unknown
from teacher_dump.corpus.columns import Columns, Frozen, Part, joined
from teacher_dump.corpus.lines import RawRecord
from teacher_dump.corpus.masks import Tokens, Unusable
from teacher_dump.corpus.pool import chunked, pooled
from teacher_dump.corpus.sources import Records, find_source, open_source, read_source
from teacher_dump.corpus.template import templated
from teacher_dump.corpus.tokenise import NOTHING, tokenise

log = logging.getLogger(__name__)

_BATCH = 256
"""Records that are tokenised together."""
_PER_PROCESS = 5_000
"""Records that are worth the start of another process."""
_PART_TOKENS, _PART_SAMPLES, _PART_SECONDS = 2**22, 2**16, 30.0
"""What is kept at once; an interrupted start loses one part."""
_NAMED = 5
"""Records of a source that are named when they cannot be used."""
_STRIDE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All samples in flat arrays: sample i owns tokens offsets[i]:offsets[i + 1]."""

    offsets: I64
    """(samples + 1,)"""
    input_ids: I32
    """(tokens,)"""
    loss_mask: npt.NDArray[np.bool_]
    """(tokens,)"""
    lengths: I64
    """(samples,) tokens of each before it was cut or dropped."""
    statuses: npt.NDArray[np.uint8]
    """(samples,) place of each status in STATUSES."""
    id_offsets: I64
    """(samples + 1,)"""
    id_bytes: npt.NDArray[np.uint8]
    """(bytes,) sample i has the id id_offsets[i]:id_offsets[i + 1], in UTF-8. Ids are the user's and need not be
    unique."""
    source_samples: list[int]
    """Samples of each source, in order."""
    source_records: list[int]
    """Records of each source that they were made of; a text that is cut into chunks is several samples."""
    problems: list[list[str]]
    """Per source, the first records of status `invalid_text`: where each is, and why."""
    fingerprint: str
    """Hash over every sample's id, status, token ids and loss mask, in order."""
    folder: Path | None = None
    """Where it is kept for later starts; None: it is not."""

    def __len__(self) -> int:
        return len(self.statuses)

    def sample(self, index: int) -> Row:
        """Sample `index`, sharing memory; it has no targets yet."""
        tokens = slice(self.offsets[index], self.offsets[index + 1])
        return Row(
            sample_index=index,
            sample_id=self.id_bytes[self.id_offsets[index] : self.id_offsets[index + 1]].tobytes().decode(),
            status=STATUSES[self.statuses[index]],
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
        )

    def have(self, status: str) -> npt.NDArray[np.bool_]:
        """(samples,) which samples have a status."""
        return np.equal(self.statuses, STATUSES.index(status))

    def status_counts(self, samples: slice = slice(None)) -> dict[str, int]:
        """How many samples, of all or of some, have each status that there is, by name."""
        codes = self.statuses[samples]
        found = {status: int(np.count_nonzero(codes == code)) for code, status in enumerate(STATUSES)}
        return {status: n for status, n in sorted(found.items()) if n}

    def why_empty(self) -> dict[str, int]:
        """Why nothing of a sample is supervised, and of how many."""
        empty, kept = self.have(EMPTY), np.diff(self.offsets)
        found = {
            "without content": int((empty & (self.lengths == 0)).sum()),
            "cut before an answer begins": int((empty & (kept < self.lengths)).sum()),
            "without an answer that is supervised": int((empty & (kept > 0) & (kept == self.lengths)).sum()),
        }
        return {reason: count for reason, count in found.items() if count}

    @property
    def truncated(self) -> int:
        """Samples that were cut to the longest allowed length."""
        starts = range(0, len(self), _STRIDE)
        cut = (np.diff(self.offsets[i : i + _STRIDE + 1]) < self.lengths[i : i + _STRIDE] for i in starts)
        return int(sum(map(np.count_nonzero, cut))) - int(np.count_nonzero(self.have(TOO_LONG)))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        starts = range(0, len(self), _STRIDE)
        return max((int(np.diff(self.offsets[i : i + _STRIDE + 1]).max()) for i in starts), default=0)


def freeze_corpus(
    section: CorpusSection,
    tokenizer: Any,
    *,
    lm_head_rows: int,
    check: Callable[[], None] = lambda: None,
    must_keep: bool = False,
) -> Corpus:
    """Read, tokenise and hash every record of every source, or take what an earlier start kept of that.

    Args:
        section: sources, mask and length policy.
        tokenizer: the teacher's fast tokenizer.
        lm_head_rows: rows of the teacher's LM head; pre-tokenised ids must be below it.
        check: called often; may raise to stop.
        must_keep: a corpus that cannot be kept for later starts is an error.

    Raises:
        DataError: a source or a record is not readable, or nothing in the corpus can be used.
        MismatchError: an object store denies access, the configured chat template cannot be used, or what must be kept
            cannot be.
        TemporaryError: an object store does not answer, or a file that must be kept may still be written to.
    """
    tokenizer = templated(tokenizer, section)
    found = [find_source(source) for source in section.sources]
    cache = cache_folder(section)

    def records_of(number: int) -> Records:
        return open_source(section.sources[number], found[number], seed=section.seed, cache=cache)

    def make(columns: Columns) -> None:
        corpus = _corpus(columns.frozen(), len(found))
        done, digest = corpus.source_records, hashlib.sha256()
        _hash(digest, corpus, first=0)
        records = [opened.get(number) or records_of(number) for number in range(len(found))]
        work = partial(_tokenise_part, tokenizer=tokenizer, section=section, lm_head_rows=lm_head_rows)
        used = sum(each.used for each in records)
        with pooled(work, processes=_processes(section, used - sum(done))) as mapped:
            for number, (source, each) in enumerate(zip(section.sources, records, strict=True)):
                raw = islice(read_source(source, each), done[number], None)
                for part in _larger(mapped(chunked(raw, _BATCH)), check):
                    columns.append(part, source=number, records=part.records, problems=part.problems[:_NAMED])
                    hashed, corpus = len(corpus), _corpus(columns.frozen(), len(found))
                    _hash(digest, corpus, first=hashed)
                    if (so_far := sum(corpus.source_records)) < used:
                        log.info("tokenised %d of %d records: %d tokens", so_far, used, len(corpus.input_ids))
        _refuse_useless(corpus)
        columns.finish(fingerprint=digest.hexdigest())

    opened = {number: records_of(number) for number, source in enumerate(found) if is_looked_up(source)}
    key = corpus_key(section, found, opened, tokenizer, lm_head_rows=lm_head_rows)
    if must_keep and key is None:
        raise why_unknown(found, opened)
    corpus = _corpus(kept(cache / "corpora", key, make=make, must_keep=must_keep), len(found))
    _refuse_bad(corpus, section)
    if corpus.truncated:
        log.warning(
            "%d of %d samples are cut to corpus.max_length %d", corpus.truncated, len(corpus), section.max_length
        )
    return corpus


def allowed_bad(records: int, share: float) -> float:
    """How many records of a source may be unusable."""
    return max(share * records, 1 if share else 0)


def _refuse_bad(corpus: Corpus, section: CorpusSection) -> None:
    """Name the records that cannot be used; DataError where a source holds more of them than is allowed."""
    first = 0
    counted = zip(section.sources, corpus.source_samples, corpus.source_records, corpus.problems, strict=True)
    for source, samples, records, problems in counted:
        bad = corpus.status_counts(slice(first, first + samples)).get(INVALID_TEXT, 0)
        first += samples
        share = section.max_bad_share
        if not bad:
            continue
        what = f"{bad} of {records} records of {source.path} cannot be used"
        if bad > allowed_bad(records, share):
            raise DataError(
                what,
                got="; ".join(problems),
                expected=f"a share of at most {share:g} (corpus.max_bad_share); one record always, unless that is 0",
                fix="correct or drop these records, or raise corpus.max_bad_share to keep them as rows without targets",
            )
        log.warning("%s (status %s), such as %s", what, INVALID_TEXT, "; ".join(problems))


def _corpus(frozen: Frozen, sources: int) -> Corpus:
    samples, records, problems = [0] * sources, [0] * sources, [list[str]() for _ in range(sources)]
    seen = 0
    for part in frozen.parts:
        if "source" in part:
            source, stop = part["source"], part["ends"]["statuses"]
            samples[source] += stop - seen
            records[source] += part["records"]
            problems[source] = [*problems[source], *part["problems"]][:_NAMED]
            seen = stop
    fingerprint = frozen.parts[-1].get("fingerprint", "") if frozen.parts else ""
    return Corpus(
        source_samples=samples,
        source_records=records,
        problems=problems,
        fingerprint=fingerprint,
        folder=frozen.folder,
        **frozen.arrays,
    )


def _processes(section: CorpusSection, records: int) -> int:
    """How many processes tokenise so many records."""
    return section.num_proc or max(1, min(usable_cores(), records // _PER_PROCESS))


def _larger(parts: Iterator[Part], check: Callable[[], None]) -> Iterator[Part]:
    """Parts that are worth keeping, of one source."""
    gathered: list[Part] = []
    started = time.monotonic()
    while True:
        check()
        part = next(parts, None)
        if part is not None:
            gathered.append(part)
        tokens = sum(len(each.arrays["input_ids"]) for each in gathered)
        samples = sum(len(each.arrays["statuses"]) for each in gathered)
        late = time.monotonic() - started > _PART_SECONDS
        if gathered and (part is None or late or tokens >= _PART_TOKENS or samples >= _PART_SAMPLES):
            yield joined(gathered)
            gathered, started = [], time.monotonic()
        if part is None:
            return


def _hash(digest: "hashlib._Hash", corpus: Corpus, *, first: int) -> None:
    """Go on with the fingerprint at sample `first`."""
    for i in range(first, len(corpus)):
        hash_sample(digest, corpus.sample(i))


def hash_sample(digest: "hashlib._Hash", sample: Row) -> None:
    """Go on with a corpus's fingerprint: its next sample."""
    head = json.dumps([sample.sample_id, sample.status, len(sample.input_ids)])
    digest.update(head.encode() + b"\n")
    digest.update(sample.input_ids.astype("<i4").tobytes())
    digest.update(sample.loss_mask.tobytes())


def _refuse_useless(corpus: Corpus) -> None:
    counts = corpus.status_counts()
    if OK in counts:
        return
    found = ", ".join(f"{n} {status}" for status, n in counts.items()) or "no records"
    why = [f"{n} {reason}" for reason, n in corpus.why_empty().items()]
    raise DataError(
        "no sample of the corpus can be used",
        got="; ".join([found, *why, *(problem for problems in corpus.problems for problem in problems[:1])]),
        expected="at least one sample with a supervised token",
        fix="correct corpus.sources, corpus.mask or corpus.max_length",
    )


def _tokenise_part(
    records: Sequence[tuple[str, str, RawRecord]], *, tokenizer: Any, section: CorpusSection, lm_head_rows: int
) -> Part:
    """Records of one source as samples; pure, so that it does not matter which process does it."""
    samples: list[tuple[bytes, int, int, Tokens]] = []
    problems: list[str] = []
    for (where, kind, _), (record_id, whole) in zip(
        records, tokenise(records, tokenizer, mask=section.mask), strict=True
    ):
        if isinstance(whole, Unusable):
            problems.append(f"{where}: {whole.reason}")
        parts: Sequence[Tokens | Unusable] = [whole]
        if kind == "text" and section.too_long == "chunk" and isinstance(whole, Tokens):
            parts = chunks(whole, section.max_length, bos=tokenizer.bos_token_id)
        for number, tokens in enumerate(parts, 1):
            sample_id = record_id if len(parts) == 1 else f"{record_id}#{number}/{len(parts)}"
            length = 0 if isinstance(tokens, Unusable) else len(tokens.input_ids)
            status, left = _judge(tokens, section, lm_head_rows, where=where)
            samples.append((sample_id.encode(errors="replace"), STATUSES.index(status), length, left))
    ids, statuses, lengths, kept = zip(*samples, strict=True)
    arrays = {
        "offsets": np.cumsum([0, *(len(tokens.input_ids) for tokens in kept)]),
        "input_ids": np.concatenate([tokens.input_ids for tokens in kept]),
        "loss_mask": np.concatenate([tokens.loss_mask for tokens in kept]),
        "lengths": np.array(lengths, np.int64),
        "statuses": np.array(statuses, np.uint8),
        "id_offsets": np.cumsum([0, *map(len, ids)]),
        "id_bytes": np.frombuffer(b"".join(ids), np.uint8),
    }
    return Part(arrays, problems[:_NAMED], len(records))


def chunks(tokens: Tokens, limit: int, *, bos: int | None) -> list[Tokens]:
    """A text as consecutive samples of at most `limit` tokens, in which each of its tokens but the first is supervised
    once.

    A chunk after the first begins with what is not supervised in it: the beginning-of-text token `bos`, where the text
    has one, and the last token of the chunk before it.
    """
    ids, mask = tokens.input_ids, tokens.loss_mask
    if len(ids) <= limit:
        return [tokens]
    begin = ids[:1] if ids[0] == bos else ids[:0]
    found = [Tokens(ids[:limit], mask[:limit])]
    step = limit - len(begin) - 1
    for start in range(limit, len(ids), step):
        context = np.concatenate([begin, ids[start - 1 : start]])
        part = slice(start, start + step)
        unsupervised = np.zeros(len(context), bool)
        found.append(Tokens(np.concatenate([context, ids[part]]), np.concatenate([unsupervised, mask[part]])))
    return found


def _judge(tokens: Tokens | Unusable, section: CorpusSection, lm_head_rows: int, *, where: str) -> tuple[str, Tokens]:
    """Status of a sample, and what is kept of it."""
    if isinstance(tokens, Unusable):
        return INVALID_TEXT, NOTHING
    ids, mask, limit = tokens.input_ids, tokens.loss_mask, section.max_length
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < lm_head_rows:
        raise DataError(
            f"{where}: a token id is outside of the teacher's vocabulary",
            got=int(ids.min()) if ids.min() < 0 else int(ids.max()),
            expected=f"0 ... {lm_head_rows - 1}",
            fix="tokenise the corpus with the teacher's tokenizer",
        )
    if len(ids) > limit:
        match section.too_long:
            case "drop":
                return TOO_LONG, NOTHING
            case "truncate" | "chunk":
                ids, mask = ids[:limit], mask[:limit]
            case "error":
                raise DataError(
                    f"{where}: the sample is too long",
                    got=f"{len(ids)} tokens",
                    expected=f"at most {limit} (corpus.max_length)",
                    fix="raise corpus.max_length, or set corpus.too_long to truncate or drop",
                )
    return (OK if mask.any() else EMPTY), Tokens(ids, mask)
