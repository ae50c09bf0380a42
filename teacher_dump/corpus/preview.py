"""What a corpus becomes, before anything is spent: per source, in lengths, and sample by sample. Loads no weights."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from storage_schemas.common.errors import UsageError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.rows import INVALID_TEXT, OK
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.cache import cache_folder
from teacher_dump.corpus.formats import Conversation, unread_columns
from teacher_dump.corpus.freeze import Corpus, allowed_bad, freeze_corpus
from teacher_dump.corpus.masks import Unusable, marks_generation
from teacher_dump.corpus.sources import find_source, open_source, read_source
from teacher_dump.corpus.template import templated
from teacher_dump.corpus.tokenise import form_of
from teacher_dump.teachers.model_files import ModelFiles, find_model
from teacher_dump.teachers.teacher import Teacher

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_ENDS = 3


class SourceView(FrozenModel):
    """One source."""

    path: str
    files: int | None
    """Files that its path stands for; null: a directory or a hub dataset, whose files `datasets` finds."""
    format: str | None
    """As configured, or as found in the first record; null without records."""
    columns: list[str]
    """Of the first record."""
    unread: list[str]
    """Those that its format does not read and nobody knows."""
    records: int
    """In its split."""
    used: int
    """What its weight leaves of them."""
    statuses: dict[str, int]
    """Samples per status."""
    problems: list[str]
    """The first records that cannot be used: where each is, and why."""
    refused: bool
    """Whether they are more than `corpus.max_bad_share`, so that nothing would be dumped."""


class Preview(FrozenModel):
    """A corpus as a whole."""

    fingerprint: str
    """Of the corpus, as it will stand in run.json."""
    sources: list[SourceView]
    samples: int
    duplicates: int
    """Samples whose token ids and mask an earlier sample has already."""
    statuses: dict[str, int]
    mask: str
    """`corpus.mask`."""
    template: Literal["marks", "located"] | None
    """`marks`: the chat template marks the assistant's text; `located`: found by rendering; null: not needed."""
    begins_with_bos: int
    """Samples whose first token is the tokenizer's beginning-of-text token."""
    doubled_bos: int
    """Samples that begin with it twice."""
    ends_with_eos: int
    """Samples whose last token is the tokenizer's end-of-text token."""
    ends: dict[str, int]
    """What supervised stretches end with, as text, the most frequent first: how many."""
    empty: dict[str, int]
    """Why nothing is supervised, of samples with status `empty`."""
    tokens: int
    supervised_tokens: int
    supervised_share: float | None
    """Of the tokens of samples that are used; null without any."""
    max_length: int
    over_max_length: int
    """Samples that were longer, and so were cut or dropped."""
    refused: bool
    """Whether one of them is refused, as `corpus.too_long: error` asks, so that nothing would be dumped."""
    lengths: dict[str, int]
    """Tokens per sample before that: median, p90, p99, max."""
    supervised_lengths: dict[str, int]
    """Supervised tokens per sample that is used: the same."""


class SampleView(FrozenModel):
    """One sample."""

    sample_index: int
    sample_id: str
    source: str
    status: str
    tokens: int
    supervised_tokens: int
    length: int
    """Tokens before it was cut or dropped."""
    parts: list[tuple[str, bool]]
    """(text, supervised) in order; all of it together is the decoded sample."""


def load_tokenizer(teacher: TeacherSection) -> tuple[Any, int]:
    """The teacher's tokenizer and the rows of its LM head; its weights are neither needed nor fetched.

    Raises:
        MismatchError: there is no such teacher, or code that it brings is another model's, or fails.
    """
    described = DescribedTeacher(teacher)
    return described.tokenizer, described.lm_head_rows


class DescribedTeacher(Teacher):
    """A teacher without its weights, which are neither needed nor fetched: tokenizer, config, what these say."""

    @cached_property
    def files(self) -> ModelFiles:
        return find_model(self.section.model, self.section.revision, self.code, weights=False)


def preview(
    section: CorpusSection, tokenizer: Any, *, lm_head_rows: int, row: int | None, samples: int
) -> tuple[Preview, list[SampleView]]:
    """Freeze the corpus as `dump` would, and look at it.

    Args:
        section: where `too_long: error` or `max_bad_share` would stop `dump`, samples are counted here.
        row: show this sample; None: show `samples` of the usable ones, evenly spaced.

    Raises:
        UsageError: there is no such row.
        DataError: the corpus cannot be used.
        MismatchError: the configured chat template cannot be used.
    """
    lenient = section.model_copy(
        update={"too_long": "drop" if section.too_long == "error" else section.too_long, "max_bad_share": 1.0}
    )
    corpus = freeze_corpus(lenient, tokenizer, lm_head_rows=lm_head_rows)
    tokenizer = templated(tokenizer, section)
    if row is not None and row >= len(corpus):
        raise UsageError("no such row in this corpus", got=row, expected=f"0 to {len(corpus) - 1}")
    usable = np.flatnonzero(corpus.have(OK))
    spaced = usable[np.unique(np.linspace(0, len(usable) - 1, min(samples, len(usable))).astype(int))]
    chosen = [row] if row is not None else spaced.tolist()
    edges = np.concatenate([[0], np.cumsum(corpus.source_samples)])
    sources, conversations = [], False
    for source, first, last, problems in zip(section.sources, edges[:-1], edges[1:], corpus.problems, strict=True):
        view, conversation = _source(source, section, corpus.status_counts(slice(first, last)), problems)
        sources.append(view)
        conversations |= conversation
    paths = [source.path for source in section.sources]
    views = [_sample(corpus, i, tokenizer, paths[int(np.searchsorted(edges, i, side="right")) - 1]) for i in chosen]
    return _whole(corpus, section, tokenizer, sources, templated=conversations), views


def _whole(
    corpus: Corpus, section: CorpusSection, tokenizer: Any, sources: list[SourceView], *, templated: bool
) -> Preview:
    template: Literal["marks", "located"] | None = None
    if templated and section.mask == "assistant":
        several = tokenizer.chat_template  # By name, or one.
        text = "".join(several.values()) if isinstance(several, dict) else tokenizer.get_chat_template()
        template = "marks" if marks_generation(text) else "located"
    starts, stops = corpus.offsets[:-1], corpus.offsets[1:]
    filled = starts < stops
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = corpus.input_ids[starts[filled]]
    longer = stops - starts > 1
    twice = (corpus.input_ids[starts[longer]] == bos) & (corpus.input_ids[starts[longer] + 1] == bos)
    sums = np.concatenate([[0], np.cumsum(corpus.loss_mask, dtype=np.int64)])
    usable = corpus.have(OK)
    supervised, tokens = (sums[stops] - sums[starts])[usable], (stops - starts)[usable]
    bodies = {_body(corpus, i) for i in np.flatnonzero(usable).tolist()}
    over = int((corpus.lengths > section.max_length).sum())
    return Preview(
        fingerprint=corpus.fingerprint,
        sources=sources,
        samples=len(corpus),
        duplicates=int(usable.sum()) - len(bodies),
        statuses=corpus.status_counts(),
        mask=section.mask,
        template=template,
        begins_with_bos=0 if bos is None else int((first == bos).sum()),
        doubled_bos=0 if bos is None else int(twice.sum()),
        ends_with_eos=0 if eos is None else int((corpus.input_ids[stops[filled] - 1] == eos).sum()),
        ends=_ends(corpus, tokenizer),
        empty=corpus.why_empty(),
        tokens=int(tokens.sum()),
        supervised_tokens=int(supervised.sum()),
        supervised_share=float(supervised.sum() / tokens.sum()) if tokens.sum() else None,
        max_length=section.max_length,
        over_max_length=over,
        refused=section.too_long == "error" and over > 0,
        lengths=_quantiles(corpus.lengths),
        supervised_lengths=_quantiles(supervised),
    )


def _ends(corpus: Corpus, tokenizer: Any) -> dict[str, int]:
    """The last tokens of supervised stretches, and how many stretches each ends."""
    follows = np.append(corpus.loss_mask[1:], False)
    follows[corpus.offsets[1:][corpus.offsets[1:] > 0] - 1] = False
    ids, counts = np.unique(corpus.input_ids[corpus.loss_mask & ~follows], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_ENDS].tolist()
    return {_decode(tokenizer, [int(ids[i])]): int(counts[i]) for i in most}


def _body(corpus: Corpus, index: int) -> bytes:
    sample = corpus.sample(index)
    return hashlib.sha256(sample.input_ids.tobytes() + sample.loss_mask.tobytes()).digest()


def _quantiles(values: Any) -> dict[str, int]:
    """Each is one of the values."""
    return {name: int(np.quantile(values, q, method="inverted_cdf")) for name, q in _QUANTILES.items()}


def _source(
    source: SourceSection, section: CorpusSection, statuses: dict[str, int], problems: list[str]
) -> tuple[SourceView, bool]:
    """What its first record says, and whether that goes through the chat template."""
    found = find_source(source)
    records = open_source(source, found, seed=section.seed, cache=cache_folder(section))
    columns, unread, conversation = [], list[str](), False
    kind: str | None = None if source.format == "auto" else source.format
    for _, detected, record in read_source(source, records, quiet=True):
        if not isinstance(record, Unusable):
            columns, kind = list(record), detected
            unread = sorted(unread_columns(record, detected)[1])
            conversation = isinstance(form_of(record, detected), Conversation)
            break
    view = SourceView(
        path=source.path,
        files=len(found.files) if found.builder else None,
        format=kind,
        columns=columns,
        unread=unread,
        records=records.total,
        used=records.used,
        statuses=statuses,
        problems=problems,
        refused=statuses.get(INVALID_TEXT, 0) > allowed_bad(records.used, section.max_bad_share),
    )
    return view, conversation


def _sample(corpus: Corpus, index: int, tokenizer: Any, source: str) -> SampleView:
    sample = corpus.sample(index)
    edges = [0, *(np.flatnonzero(np.diff(sample.loss_mask)) + 1).tolist(), len(sample.input_ids)]
    # Decoded from the beginning each time: some tokenizers drop a blank where a text begins.
    texts = ["", *(_decode(tokenizer, sample.input_ids[:stop].tolist()) for stop in edges[1:])]
    return SampleView(
        sample_index=index,
        sample_id=sample.sample_id,
        source=source,
        status=sample.status,
        tokens=len(sample.input_ids),
        supervised_tokens=int(sample.loss_mask.sum()),
        length=int(corpus.lengths[index]),
        parts=[
            (after[len(before) :], bool(sample.loss_mask[start]))
            for (before, after), start in zip(pairwise(texts), edges, strict=False)
            if start < len(sample.input_ids)
        ],
    )


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
