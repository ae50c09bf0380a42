"""Import: the targets of another project's store become a dump, which then is one like any other.

The store is read twice. First all of it is looked at, so that what contradicts its claims is refused before anything is
written, and the corpus has its fingerprint; then units are committed. The same command continues.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from storage_schemas.common.errors import DataError, MismatchError, UsageError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.signals import stoppable
from storage_schemas.config import DumpSection, TopK
from storage_schemas.provenance import IMPORT, CorpusIdentity, EngineIdentity, MadeBy, Provenance, TeacherIdentity
from storage_schemas.reader import Dump
from storage_schemas.records import count_statuses, mean_per_token, totals
from storage_schemas.rows import Row
from storage_schemas.writer import DumpWriter
from teacher_dump.config import TeacherSection
from teacher_dump.corpus.freeze import hash_sample
from teacher_dump.corpus.preview import load_tokenizer
from teacher_dump.dump import refuse_unusable, tokenizer_files, tokenizer_identity
from teacher_dump.foreign import distillkit, lists, megatron, tables
from teacher_dump.foreign.sample import Claims, ForeignSample, Made, Survey, make_row

Layout = Literal["distillkit", "axolotl", "lists", "megatron"]
_OF_T_1 = {"values": "logprobs", "tail": "implied", "temperature": 1.0}
_KNOWN: dict[str, dict[str, Any]] = {
    "distillkit": {"shift": "next", **_OF_T_1},
    "axolotl": {"values": "logprobs", "mask": "labels"},
    "lists": {},
    "megatron": {"shift": "next", **_OF_T_1},
}
"""What a layout itself says of its numbers. All else is asked for."""
_UNKNOWN = "unknown"
"""In run.json, of a teacher that this project did not run."""


class ImportSummary(FrozenModel):
    """What was imported, and what the data say of its claims."""

    url: str
    """Where the dump lies."""
    fingerprint: str
    """Of the dump."""
    units: int
    """Units in all; all are committed."""
    rows: int
    """Samples in all."""
    supervised_tokens: int
    """Tokens with a target, in all."""
    left_out: int
    """Tokens that the store supervises without a target for them; they are not trained on."""
    statuses: dict[str, int]
    """Rows per status."""
    mean_kept_mass: float | None
    """Mean probability inside the heads; null without targets."""
    p_described: float
    """Mean probability that the targets give to the tokens that they describe, among their entries."""
    p_under_other_shift: float
    """And to those that they would describe under the other shift."""
    shift_standard_errors: float | None
    """By how many standard errors the first is larger; below 3 the data do not tell. Null: without any spread."""


def bring(
    layout: Layout,
    source: Path,
    dump: DumpSection,
    *,
    teacher: TeacherSection,
    claims: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    tokens: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportSummary:
    """Import a store into a dump, and seal it.

    Args:
        layout: of the store.
        source: file or directory that holds it.
        dump: where to, and how it is cut and rounded.
        teacher: the model behind the values; its config.json and tokenizer are read, no weight.
        claims: fields of `Claims` that the layout does not say.
        columns: for `lists`, other names of the columns with `ids` and `values`.
        tokens: for `megatron`, the file with the sequences that the teacher has seen.
        progress: called with (units done, units in all).

    Raises:
        UsageError: something has to be said that was not, or the layout says otherwise.
        MismatchError: the store, the teacher or the dump at the URL is another one.
        DataError: the store is damaged, or contradicts what is claimed of it.
        TemporaryError: a stop was requested; the same call continues.
    """
    told = _claims(layout, claims)
    if columns and (layout != "lists" or set(columns) - {"ids", "values"}):
        raise UsageError("--column is for `lists`", got=dict(columns), expected="ids=NAME or values=NAME")
    if (tokens is not None) != (layout == "megatron"):
        raise UsageError(
            "--tokens is for `megatron`, and needed there: its stores hold no tokens",
            got=tokens,
            expected="a file with a row of `input_ids` per sequence" if layout == "megatron" else "none",
        )
    files = tables.files_of(source, (".tar",) if layout == "megatron" else tables.SUFFIXES)
    texts = tables.files_of(tokens) if tokens is not None else []
    codec = [distillkit.config_file(source)] if layout == "distillkit" else []
    hashes = tables.named_hashes([*files, *codec, *texts])
    refuse_unusable(dump)
    try:
        tokenizer, lm_head_rows = load_tokenizer(teacher)
    except MismatchError as error:
        raise MismatchError(error.what, got=error.got, expected=error.expected, fix="correct --teacher") from error
    named = {"axolotl": lists.AXOLOTL, "lists": lists.LISTS}.get(layout, {}) | dict(columns or {})
    read = {
        "distillkit": partial(distillkit.read, source, files),
        "megatron": partial(megatron.read, files, texts),
    }.get(layout, partial(lists.read, files, named))
    with stoppable() as stop:
        survey, digest, count, longest, k = Survey(), hashlib.sha256(), 0, 1, 0
        for made in _made(read(mask=told.mask), told, lm_head_rows):
            stop.check()
            survey.add(made)
            hash_sample(digest, made.row)
            count, longest = count + 1, max(longest, len(made.row.input_ids))
            k = max(k, 0 if made.row.targets is None else int(made.row.targets.lengths.max()))
        _refuse_empty(source, survey, count)
        survey.refuse_contradicted(told, heads_are_whole=k >= lm_head_rows, must_be_sure=layout == "megatron")
        provenance = Provenance(
            teacher=TeacherIdentity(
                config_sha256=_UNKNOWN, weights_sha256={}, dtype=_UNKNOWN, lm_head_rows=lm_head_rows
            ),
            tokenizer=tokenizer_identity(tokenizer),
            corpus=CorpusIdentity(
                fingerprint=digest.hexdigest(),
                samples=count,
                mask="all" if told.mask == "all" else f"column {told.mask}",
                max_length=longest,
                too_long="as imported",
            ),
            samples_per_unit=dump.samples_per_unit,
            estimator=TopK(k=k, mass=1.0),
            temperatures=(1.0,),
            logsumexp=False,
            logprob_step=dump.logprob_step,
            max_kl=dump.max_kl,
            engine=EngineIdentity(
                name=IMPORT,
                arguments={"layout": layout, **told.model_dump(mode="json"), "columns": named, "files": hashes},
            ),
            made_by=MadeBy(model=teacher.model, revision=teacher.revision),
        )
        writer = DumpWriter.open(dump.url, provenance, options=dump.storage_options)
        if not writer.has_tokenizer():
            writer.put_tokenizer(tokenizer_files(tokenizer))
        committed, rows = writer.committed(), list[Row]()
        for made in _made(read(mask=told.mask), told, lm_head_rows) if len(committed) < provenance.units else ():
            stop.check()
            rows.append(made.row)
            unit = made.row.sample_index // provenance.samples_per_unit
            if len(rows) == len(provenance.unit_range(unit)):
                if unit not in committed:
                    writer.commit_unit(unit, rows)
                rows = []
                if progress is not None:
                    progress(unit + 1, provenance.units)
        writer.seal()
    return _summary(dump, survey)


def _claims(layout: Layout, said: Mapping[str, Any]) -> Claims:
    """What the layout and the user say together."""
    known, given = _KNOWN[layout], {name: value for name, value in said.items() if value is not None}
    if against := [name for name in known.keys() & given.keys() if known[name] != given[name] and name != "mask"]:
        raise UsageError(
            f"the layout `{layout}` says otherwise",
            got=", ".join(f"--{name} {given[name]}" for name in against),
            expected=", ".join(f"{name} {known[name]}" for name in against),
            fix="leave it out; or import the store as `lists`, if its columns are those",
        )
    found = known | given
    if missing := [name for name in Claims.model_fields if name not in found]:
        raise UsageError(
            f"a store of the layout `{layout}` does not say what its numbers mean",
            got="nothing about " + ", ".join(missing),
            expected=", ".join(f"--{name}" for name in missing),
            fix="see `llm-neo import --help` and `llm-neo docs interoperability`; a wrong word trains on wrong targets",
        )
    try:
        claims = Claims.model_validate(found)
    except ValidationError as error:
        told = error.errors()[0]
        fix = "see `llm-neo import --help`"
        raise UsageError(f"--{told['loc'][0]}: {told['msg']}", got=told["input"], fix=fix) from error
    if claims.temperature != 1.0:
        raise MismatchError(
            "values of another temperature cannot be imported",
            got=claims.temperature,
            expected="1.0, at which a dump holds them: what the tail had there cannot be computed from them",
            fix="capture the teacher at temperature 1; training applies loss.temperature where the dump allows it",
        )
    if claims.values == "logits" and claims.tail == "implied":
        raise UsageError(
            "logits without their logsumexp say nothing of the tail",
            got="--values logits --tail implied",
            expected="--tail lost, or log-probs",
        )
    return claims


def _made(samples: Iterator[ForeignSample], claims: Claims, lm_head_rows: int) -> Iterator[Made]:
    for index, sample in enumerate(samples):
        yield make_row(sample, claims, index, lm_head_rows=lm_head_rows)


def _refuse_empty(source: Path, survey: Survey, count: int) -> None:
    if not survey.targets:
        raise DataError(
            f"{source} holds nothing to train on",
            got=f"{count} samples, no supervised token with a target that is finite",
            expected="at least one",
            fix="check the layout, --mask and --values",
        )


def _summary(dump: DumpSection, survey: Survey) -> ImportSummary:
    found = Dump.open(dump.url, options=dump.storage_options)
    records = found.read_records()
    sums, errors = totals(records), survey.standard_errors
    return ImportSummary(
        url=dump.url,
        fingerprint=found.fingerprint,
        units=len(records),
        rows=sums["rows"],
        supervised_tokens=sums["supervised_tokens"],
        left_out=survey.left_out,
        statuses=count_statuses(records),
        mean_kept_mass=mean_per_token(records, "mean_kept_mass"),
        p_described=survey.own,
        p_under_other_shift=survey.other,
        shift_standard_errors=errors if abs(errors) < float("inf") else None,
    )
