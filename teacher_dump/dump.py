"""Stage one: run the teacher over the corpus once and commit its targets, unit by unit, beside other workers."""

import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.signals import StopRequest, stoppable
from storage_schemas.config import DumpSection, Estimator
from storage_schemas.provenance import CorpusIdentity, Provenance, TokenizerIdentity
from storage_schemas.reader import Dump
from storage_schemas.records import RUN, count_statuses, mean_per_token, totals
from storage_schemas.rows import NONFINITE, OK, Row
from storage_schemas.stores.store import Store
from storage_schemas.targets import Targets
from storage_schemas.tokenizer import vocab_sha256
from storage_schemas.writer import DumpWriter
from teacher_dump.committer import Committer
from teacher_dump.config import CorpusSection, TeacherSection
from teacher_dump.corpus.freeze import Corpus, freeze_corpus
from teacher_dump.corpus.heldout import refuse_shared
from teacher_dump.corpus.template import templated
from teacher_dump.others import Others
from teacher_dump.progress import DumpProgress, event_log
from teacher_dump.teachers.open import opened
from teacher_dump.teachers.teacher import PendingTargets, Teacher

log = logging.getLogger(__name__)

_LOADED_HOW = ("local_files_only", "is_local")
"""What transformers writes among a tokenizer's settings and changes with HF_HUB_OFFLINE: workers would disagree."""
_OF_OTHERS = {"adapter_config.json", "checkpoints", "config.json", "events.jsonl", "final", "summary.json"}
"""Names in directories of runs and models."""
_SEAL_SECONDS = 1 / 500
"""Per unit, to read its record for the seal, on a distant store."""
_TELL_SECONDS = 3.0


class DumpSummary(FrozenModel):
    """What a dump holds, and what this worker did for it."""

    url: str
    """Where it lies."""
    fingerprint: str
    """Of the dump."""
    units: int
    """Units in all; all are committed."""
    units_done_here: int
    """Units that this call committed."""
    units_lost_here: int
    """Units that this call computed and another worker committed first."""
    rows: int
    """Samples in all."""
    tokens: int
    """Tokens in all."""
    supervised_tokens: int
    """Tokens with a target, in all."""
    bytes: int
    """Of all data files."""
    bytes_per_supervised_token: float | None
    """All columns counted; null without supervised tokens."""
    mean_kept_mass: float | None
    """Mean probability inside the heads; null without supervised tokens."""
    statuses: dict[str, int]
    """Rows per status, in all."""
    truncated: int
    """Samples that were cut to `corpus.max_length`, in all."""
    tokens_here: int
    """Tokens that this call sent through the teacher, without padding."""
    seconds: float
    """From the first batch to the last commit; 0 if there was nothing to do."""
    tokens_per_second: float | None
    """Of this call; null if there was nothing to do."""


def run_dump(
    *,
    dump: DumpSection,
    teacher: Teacher | TeacherSection,
    corpus: CorpusSection,
    estimator: Estimator,
    temperatures: Sequence[float] = (1.0,),
    apart_from: CorpusSection | None = None,
    rank: int = 0,
    world_size: int = 1,
    events: Path | None = None,
    console: Console | None = None,
) -> DumpSummary:
    """Work on a dump until all its units are committed, and seal it. Running it again continues, or does nothing.

    Args:
        dump: where to, and how it is cut and encoded.
        teacher: a Teacher that was loaded once can serve several dumps.
        corpus: what is distilled on.
        estimator: how targets are chosen.
        temperatures: of the stored tail masses; the first is 1.
        apart_from: the training corpus, if these are held-out samples, which must not be its samples.
        rank: which worker this is.
        world_size: how many there are; it may differ from call to call.
        events: file that one JSON object per event is appended to.
        console: where the progress bar goes; standard error by default.

    Raises:
        MismatchError: the dump at the URL was made with other settings, or the teacher cannot be loaded.
        DataError: the corpus cannot be used.
        TemporaryError: a stop was requested, or the store cannot be written to; the same call continues.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} workers")
    with opened(teacher) as teacher, stoppable() as stop:
        teacher.refuse_unsupported(estimator, temperatures, logsumexp=dump.logsumexp)
        refuse_wider_than_vocabulary(estimator, teacher)
        # What can be refused is refused before hours go by, and before anything is written.
        refuse_unusable(dump)
        teacher.refuse_unloadable()
        samples = freeze_corpus(corpus, teacher.tokenizer, lm_head_rows=teacher.lm_head_rows, check=stop.check)
        refuse_too_long(samples, teacher)
        if apart_from is not None:
            log.info("reading the training corpus, which must not hold these samples")
            trained = freeze_corpus(apart_from, teacher.tokenizer, lm_head_rows=teacher.lm_head_rows, check=stop.check)
            refuse_shared(trained, heldout=samples)
        provenance = provenance_of(dump, teacher, corpus, samples, estimator=estimator, temperatures=temperatures)
        if DumpWriter.join(dump.url, provenance, options=dump.storage_options) is None:
            teacher.start(samples, provenance)  # No dump is known by weights that do not load.
        writer = DumpWriter.open(dump.url, provenance, options=dump.storage_options)
        if not writer.has_tokenizer():  # Another version of transformers may save the same one as other bytes.
            writer.put_tokenizer(tokenizer_files(templated(teacher.tokenizer, corpus)))
        worker = UnitWorker(writer, teacher, samples, rank=rank, world_size=world_size, stop=stop)
        with event_log(events, rank=rank) as log_events:
            worker.run(log_events, console)
            summary = summarise(dump, worker)
            log_events("end", **summary.model_dump(mode="json"))
    return summary


def refuse_unusable(dump: DumpSection) -> None:
    """Raise MismatchError if there is no dump at the URL and none can be begun. No local directory is created."""
    store = Store(dump.url, options=dump.storage_options)
    store.refuse_read_only()
    if store.get_if_present(RUN) is not None:
        return
    if store.root is None:
        store.probe()
        return
    there = next(path for path in (store.root.absolute(), *store.root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise MismatchError(
            f"{dump.url} cannot be written to",
            got=f"{there} is {'read-only' if there.is_dir() else 'no directory'}",
            expected="a directory, or a place where one can be made",
            fix="correct dump.url, or the permissions",
        )
    if there == store.root.absolute() and (marks := sorted(_OF_OTHERS & {path.name for path in there.iterdir()})):
        raise MismatchError(
            f"{dump.url} holds something else: a run or a model",
            got=f"{', '.join(marks)} in it",
            expected="a new or empty directory, or a dump",
            fix="choose another dump.url (or heldout.url), such as a new directory in there",
        )


def provenance_of(
    dump: DumpSection,
    teacher: Teacher,
    section: CorpusSection,
    corpus: Corpus,
    *,
    estimator: Estimator,
    temperatures: Sequence[float],
) -> Provenance:
    """run.json of a dump; no weight is loaded for it."""
    return Provenance(
        teacher=teacher.identify(),
        tokenizer=tokenizer_identity(templated(teacher.tokenizer, section)),
        corpus=CorpusIdentity(
            fingerprint=corpus.fingerprint,
            samples=len(corpus),
            mask=section.mask,
            max_length=section.max_length,
            too_long=section.too_long,
        ),
        samples_per_unit=dump.samples_per_unit,
        estimator=estimator,
        temperatures=tuple(temperatures),
        logsumexp=dump.logsumexp,
        logprob_step=dump.logprob_step,
        max_kl=dump.max_kl,
        engine=teacher.engine,
        made_by=teacher.note_origin(),
        **({} if teacher.masked_from is None else {"masked_from": teacher.masked_from}),
    )


def refuse_wider_than_vocabulary(estimator: Estimator, teacher: Teacher) -> None:
    """Raise MismatchError if a head shall have more entries than there are ids."""
    ids = teacher.masked_from or teacher.lm_head_rows
    wanted = {name: value for name, value in estimator.model_dump().items() if name in ("k", "k_min", "k_max")}
    if too_many := {f"estimator.{name}": value for name, value in wanted.items() if value > ids}:
        raise MismatchError(
            "the estimator asks for more entries than the teacher's vocabulary has",
            got=", ".join(f"{name} = {value}" for name, value in too_many.items()),
            expected=f"at most {ids}",
            fix="lower it, for held-out samples with heldout.estimator; 64 holds nearly all of the probability of most "
            "tokens, `llm-neo plan` says how much",
        )


def refuse_too_long(corpus: Corpus, teacher: Teacher) -> None:
    """Raise MismatchError if a sample is longer than what the teacher was made for."""
    if teacher.positions is not None and corpus.longest > teacher.positions:
        raise MismatchError(
            "a sample is longer than what the teacher can see",
            got=f"{corpus.longest} tokens",
            expected=f"at most {teacher.positions}: {teacher.positions_rule}",
            fix=f"set corpus.max_length to {teacher.positions} or less",
        )


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """What its ids mean, and its chat template, as hashes."""
    vocab, template = tokenizer.get_vocab(), tokenizer.chat_template
    return TokenizerIdentity(
        vocab_size=len(vocab),
        vocab_sha256=vocab_sha256(vocab),
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
    )


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The tokenizer as transformers saves it, by file name, less what only says how it was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        settings = Path(folder) / "tokenizer_config.json"
        if settings.is_file():
            kept = {name: value for name, value in json.loads(settings.read_text()).items() if name not in _LOADED_HOW}
            settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


class UnitWorker:
    """One worker's way through the units."""

    def __init__(
        self, writer: DumpWriter, teacher: Teacher, corpus: Corpus, *, rank: int, world_size: int, stop: StopRequest
    ) -> None:
        self.writer, self.teacher, self.corpus, self.stop = writer, teacher, corpus, stop
        self.rank, self.world_size = rank, world_size
        self.units_done_here = self.units_lost_here = self.tokens = 0
        self.seconds = 0.0
        self._collector = ThreadPoolExecutor(1, "targets")
        """Waits for the targets of one batch while the next one, of its unit or another, goes through the teacher."""
        self._waiting: Future[None] | None = None

    def run(self, events: Callable[..., None], console: Console | None) -> None:
        """Take units until none is left, then seal; without open units, the weights are not loaded.

        Raises:
            TemporaryError: the dump is not complete at the end.
        """
        provenance = self.writer.provenance
        others = Others(self.writer)
        events("start", world_size=self.world_size, units=provenance.units, done=len(others.committed))
        if len(others.committed) < provenance.units:
            self.teacher.start(self.corpus, provenance)
            starts = np.minimum(np.arange(provenance.units + 1) * provenance.samples_per_unit, len(self.corpus))
            sizes = np.diff(self.corpus.offsets[starts])
            progress = DumpProgress(unit_tokens=sizes, world_size=self.world_size, events=events, console=console)
            with progress.shown(), Committer(self.writer) as commits:
                self._take_all(others, commits, progress)
                commits.close()
                progress.update(committed=self.writer.committed(), records=commits.won, last=True)
            self.units_done_here, self.tokens, self.seconds = len(commits.won), progress.tokens, progress.seconds
            self.units_lost_here += len(commits.lost)
        self._let_the_first_seal()
        if not self.writer.seal():
            raise TemporaryError(
                f"{self.writer.store.url} is not complete",
                got=f"{len(self.writer.committed())} of {provenance.units} units",
                fix="run the same command again",
            )

    def _take_all(self, others: Others, commits: Committer, progress: DumpProgress) -> None:
        """Go through its own units, rank, rank + world_size, ..., and then help others with what they have left.

        Workers that do not know of each other, both rank 0 of 1, would do the same work to the end: once they have met,
        they go on in random order.
        """
        units = range(self.writer.provenance.units)
        todo = deque(units[self.rank :: self.world_size])
        rest = [unit for unit in units if unit % self.world_size != self.rank]
        own, among, met = len(todo), len(units), 0
        while todo or rest:
            if not todo:
                others.committed |= self.writer.committed()
                own, among = 0, 2 * self.world_size
                todo, rest = deque(others.left(rest, among=among)), []
                continue
            self._take(todo.popleft(), others, commits, progress)
            lost = self.units_lost_here + len(commits.lost)
            if lost > met:
                todo = deque(others.left(todo, among=among))
                # Who helps meets others now and then, and so does who is helped.
                if not met and (self.world_size == 1 or len(todo) > own // 2 > 0):
                    log.warning(
                        "another worker commits the same units; give each its --rank and --world-size, so that none "
                        "is computed twice"
                    )
                met = lost
        if self._waiting is not None:
            self._waiting.result()  # That of a unit that was left, too: other processes may be in the middle of it.

    def _take(self, unit: int, others: Others, commits: Committer, progress: DumpProgress) -> None:
        """Send a unit through the teacher, unless somebody else commits it first; its last batch is still under way."""
        if unit in others.committed or self.writer.is_committed(unit):
            return
        samples = [self.corpus.sample(index) for index in self.writer.provenance.unit_range(unit)]
        usable = [sample for sample in samples if sample.status == OK]
        found: dict[int, Targets | None] = {}
        begun = False

        def collect(batch: Sequence[Row], pending: PendingTargets) -> None:
            found.update(zip((sample.sample_index for sample in batch), pending(), strict=True))

        def complete(last: Future[None] | None) -> None:
            if last is not None:
                last.result()
            refuse_nonfinite(unit, [found[sample.sample_index] is None for sample in usable], self.teacher)
            commits.commit(unit, [row_of(sample, found.get(sample.sample_index)) for sample in samples])

        for batch in self.teacher.batches(usable):
            self.stop.check()
            commits.check()
            others.look(unit)
            if unit in others.committed:
                self.units_lost_here += begun
                return
            pending = self.teacher.launch(batch, self.writer.provenance.recipe)
            if self._waiting is not None:
                self._waiting.result()
            self._waiting = self._collector.submit(collect, batch, pending)
            begun = True
            progress.count(unit, sum(len(sample.input_ids) for sample in batch))
            progress.update(committed=others.committed, records=commits.won)
        if self._waiting is not None and not begun:
            self._waiting.result()  # Or units of which nothing is sent would pile up.
        self._waiting = self._collector.submit(complete, self._waiting)

    def _let_the_first_seal(self) -> None:
        """Wait, if others are at the same end, as long as the first worker may take to read all records and seal."""
        if not self.rank or self.writer.is_sealed():
            return
        seconds = self.writer.provenance.units * _SEAL_SECONDS * random.Random().uniform(1, 2)
        if seconds > _TELL_SECONDS:
            log.info("all units are committed; waiting up to %.0f s for another worker to seal", seconds)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.writer.is_sealed():
            self.stop.check()
            time.sleep(min(1.0, seconds))


def refuse_nonfinite(unit: int, nonfinite: Sequence[bool], teacher: Teacher) -> None:
    """Raise DataError if a teacher has nothing finite to say: to all samples of a unit, or to most of many."""
    if (len(nonfinite) > 1 and all(nonfinite)) or sum(nonfinite) > max(8, len(nonfinite) // 2):
        raise DataError(
            f"the teacher {teacher.section.model} gives logits that are not finite",
            got=f"{sum(nonfinite)} of {len(nonfinite)} samples of unit {unit}, in {teacher.section.dtype}",
            expected="finite logits for nearly all samples",
            fix="set teacher.dtype to bfloat16 or float32 (float16 overflows in some models), or mend its weights",
        )


def summarise(dump: DumpSection, worker: UnitWorker) -> DumpSummary:
    """Totals of a sealed dump, from its manifest."""
    found = Dump.open(dump.url, options=dump.storage_options)
    records = found.read_records()
    sums = totals(records)
    supervised = sums["supervised_tokens"]
    return DumpSummary(
        url=dump.url,
        fingerprint=worker.writer.provenance.fingerprint,
        units=len(records),
        units_done_here=worker.units_done_here,
        units_lost_here=worker.units_lost_here,
        bytes_per_supervised_token=sums["bytes"] / supervised if supervised else None,
        mean_kept_mass=mean_per_token(records, "mean_kept_mass"),
        statuses=count_statuses(records),
        truncated=worker.corpus.truncated,
        **sums,
        tokens_here=worker.tokens,
        seconds=worker.seconds,
        tokens_per_second=worker.tokens / worker.seconds if worker.tokens else None,
    )


def row_of(sample: Row, targets: Targets | None) -> Row:
    """A sample with its targets; usable ones without had logits that are not finite."""
    status = NONFINITE if sample.status == OK and targets is None else sample.status
    return replace(sample, status=status, targets=targets)
