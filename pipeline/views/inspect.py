"""What a dump holds: its header from the records alone, and single rows token by token, as plain values.

`terminal.py` and `page.py` draw them, and `--json` prints them as they are.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from storage_schemas.common.errors import UsageError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.common.secrets import visible
from storage_schemas.config import described
from storage_schemas.reader import Dump
from storage_schemas.records import count_statuses, mean_per_token, totals
from storage_schemas.rows import OK, Row
from storage_schemas.shift import supervised_positions
from storage_schemas.targets import Decoded, decode

TOP = 5
"""Entries that are shown of a target."""
BLANK = "\u2581"
"""Stands for a blank, as SentencePiece writes it; an underscore would look like one of the text."""
_CONTEXT = 6
"""Tokens that are shown before the supervised one."""


class Shade(NamedTuple):
    """One colour of the scale on which tokens are drawn, and what it says."""

    least: float
    """Smallest probability that has this colour."""
    label: str
    background: str
    foreground: str


SHADES = (
    Shade(0.9, "p at least 0.9", "#d5efcf", "#1c1c1c"),
    Shade(0.5, "0.5 to 0.9", "#f4f1a5", "#1c1c1c"),
    Shade(0.1, "0.1 to 0.5", "#fcc87c", "#1c1c1c"),
    Shade(0.01, "0.01 to 0.1", "#f0814f", "#1c1c1c"),
    Shade(0.0, "below 0.01", "#b81d2c", "#ffffff"),
    Shade(-1.0, "not among the stored entries", "#64479a", "#ffffff"),
)
"""From likely to unlikely, ever darker, so that it can be read without seeing hues; the last is for unknown p."""


def shade(p: float | None) -> int:
    """Place in SHADES of a token whose probability is `p`."""
    return next(i for i, step in enumerate(SHADES) if (-1.0 if p is None else p) >= step.least)


class Header(FrozenModel):
    """A dump as a whole."""

    url: str
    fingerprint: str
    sealed: bool
    teacher: str
    """Directory or hub id, and the commit if it came from the hub."""
    teacher_dtype: str
    tokenizer_ids: int
    """Ids that the tokenizer knows."""
    head_size: int
    """Rows of the teacher's LM head."""
    estimator: str
    temperatures: tuple[float, ...]
    units: int
    """Units in all."""
    committed: int
    """Units that are committed."""
    rows: int
    """Rows of the committed units."""
    statuses: dict[str, int]
    tokens: int
    supervised_tokens: int
    entries_per_supervised_token: float | None
    bytes: int
    bytes_per_supervised_token: float | None
    mean_kept_mass: float | None
    """Mean probability inside the stored heads."""
    mean_entropy: float | None
    """Mean entropy of the teacher, nats."""
    fidelity: tuple[float, ...] | None
    """Mean KL(exact || stored) in nats, per temperature."""


class TokenView(FrozenModel):
    """One supervised token of a row."""

    position: int
    """Place of the token in the sample."""
    context: str
    """The text of the few tokens before it; the logits of the last one predict it."""
    token: str
    """The token itself, the label."""
    rank: int | None
    """Its rank among the stored entries, from 1, up to ties that rounding makes; null if it is not among them."""
    p: float | None
    """The teacher's probability of it; null if it is not among the stored entries."""
    top: list[tuple[str, float]]
    """The most probable stored entries."""
    mass: float
    """Probability inside the exact head."""
    entropy: float
    """Of what is stored, the tail being one event, nats."""


class RowView(FrozenModel):
    """One row."""

    sample_index: int
    sample_id: str
    status: str
    text: str
    pieces: list[str]
    """What each token adds to the text; "" where it begins a character that a later token completes."""
    tokens: int
    supervised: list[TokenView]


def header(dump: Dump) -> Header:
    """The dump as a whole, from run.json and the commit records; no data file is read."""
    run, records = dump.provenance, dump.read_records()
    sums = totals(records)
    supervised, size = sums["supervised_tokens"], sums["bytes"]
    entries = sum(record.entries for record in records.values())
    fidelity = zip(*(record.fidelity for record in records.values()), strict=True)
    return Header(
        url=dump.store.url,
        fingerprint=dump.fingerprint,
        sealed=dump.is_sealed(),
        teacher=run.origin.model + (f" @ {run.origin.revision}" if run.origin.revision else ""),
        teacher_dtype=run.teacher.dtype,
        tokenizer_ids=run.tokenizer.vocab_size,
        head_size=run.teacher.lm_head_rows,
        estimator=described(run.estimator),
        temperatures=run.temperatures,
        units=run.units,
        committed=len(records),
        statuses=count_statuses(records),
        entries_per_supervised_token=entries / supervised if supervised else None,
        bytes_per_supervised_token=size / supervised if supervised else None,
        mean_kept_mass=mean_per_token(records, "mean_kept_mass"),
        mean_entropy=mean_per_token(records, "mean_entropy"),
        fidelity=tuple(map(max, fidelity)) or None,
        **sums,
    )


def row_views(dump: Dump, sample_indices: Sequence[int]) -> list[RowView]:
    """Rows, decoded with the dump's own tokenizer.

    Raises:
        UsageError: there is no such sample.
        DataError: its unit is not committed, or damaged.
    """
    samples = dump.provenance.corpus.samples
    for index in sample_indices:
        if not 0 <= index < samples:
            raise UsageError("no such row in this dump", got=index, expected=f"0 to {samples - 1}")
    tokenizer = tokenizer_of(dump) if sample_indices else None
    views = []
    for unit, indices in groupby(sample_indices, lambda index: index // dump.provenance.samples_per_unit):
        rows = dump.read_unit(unit)
        for index in indices:
            row = rows.row(index - dump.provenance.unit_range(unit).start)
            pieces = text_pieces(tokenizer, row.input_ids.tolist())
            view = RowView(
                sample_index=row.sample_index,
                sample_id=row.sample_id,
                status=row.status,
                text="".join(pieces),
                pieces=pieces,
                tokens=len(row.input_ids),
                supervised=_token_views(row, dump, tokenizer, pieces),
            )
            views.append(view)
    return views


def tokenizer_of(dump: Dump) -> Tokenizer | None:
    """The dump's own; None if it has no fast one."""
    files = dump.read_tokenizer()
    return Tokenizer.from_str(files["tokenizer.json"].decode()) if "tokenizer.json" in files else None


def _token_views(row: Row, dump: Dump, tokenizer: Tokenizer | None, pieces: list[str]) -> list[TokenView]:
    if row.status != OK or row.targets is None:
        return []
    positions = supervised_positions(row.loss_mask)
    decoded = decode(row.targets, temperature_index=dump.provenance.temperature_index(1.0))
    views = []
    for i, (token, before) in enumerate(zip(positions.tokens, positions.logits, strict=True)):
        filled = int(row.targets.lengths[i])
        ids, p = decoded.ids[i, :filled], np.exp(decoded.logprobs[i, :filled].astype(np.float64))
        order = np.argsort(-p, kind="stable")
        label, anchor = int(row.input_ids[token]), int(row.input_ids[before])
        found = np.flatnonzero(ids[order] == label)
        views.append(
            TokenView(
                position=int(token),
                context="".join(pieces[max(0, int(token) - _CONTEXT) : int(token)]),
                token=_text_after(tokenizer, anchor, label),
                rank=int(found[0]) + 1 if found.size else None,
                p=float(p[order][found[0]]) if found.size else None,
                top=[(_text_after(tokenizer, anchor, int(ids[j])), float(p[j])) for j in order[:TOP]],
                mass=float(p[decoded.in_head[i, :filled]].sum()),
                entropy=_entropy(decoded, i),
            )
        )
    return views


def _entropy(decoded: Decoded, i: int) -> float:
    """Entropy in nats of a token's weights; what no entry stands for counts as one event."""
    weights = decoded.weights[i].astype(np.float64)
    rest = max(0.0, 1.0 - float(weights.sum()))
    return float(sum(-w * math.log(w) for w in [*weights.tolist(), rest] if w > 0))


def text_pieces(tokenizer: Tokenizer | None, ids: list[int]) -> list[str]:
    """What each token adds to the text of the ones before it; `<id>` for one that the tokenizer does not know.

    Tokens are decoded behind their neighbours: many tokenizers drop the blank before a token that stands alone. One
    that ends inside a character adds nothing, and the one that completes it adds the character.
    """
    pieces: list[str] = []
    start = shown = 0  # ids[start:shown] are shown and give the context; ids[shown:i] wait for the end of a character.
    for i, token in enumerate(ids):
        if not _known(tokenizer, token):
            if shown < i and tokenizer is not None:
                pieces[-1] = tokenizer.decode(ids[shown:i], skip_special_tokens=False)
            pieces.append(f"<{token}>")
            start = shown = i + 1
            continue
        assert tokenizer is not None
        before = tokenizer.decode(ids[start:shown], skip_special_tokens=False)
        text = tokenizer.decode(ids[start : i + 1], skip_special_tokens=False)
        # No character has more than four bytes: what is incomplete by then is no text.
        whole = not text.endswith("\ufffd") or i - shown >= 3 or i == len(ids) - 1
        pieces.append(text[len(before) :] if whole else "")
        if whole:
            start, shown = shown, i + 1
    return pieces


def _text_after(tokenizer: Tokenizer | None, anchor: int, token: int) -> str:
    """The text of a token that follows `anchor`."""
    if not _known(tokenizer, token):
        return f"<{token}>"
    assert tokenizer is not None
    before = tokenizer.decode([anchor], skip_special_tokens=False)
    both = tokenizer.decode([anchor, token], skip_special_tokens=False)
    found = both.removeprefix(before) if both.startswith(before) else ""
    return found or tokenizer.decode([token], skip_special_tokens=False) or f"<{token}>"


def _known(tokenizer: Tokenizer | None, token: int) -> bool:
    return tokenizer is not None and tokenizer.id_to_token(token) is not None


def header_lines(view: Header) -> list[tuple[str, str]]:
    """The header as (name, value) for people."""
    state = "sealed" if view.sealed else f"not sealed: {view.committed} of {view.units} units committed"
    lines = [
        ("dump", view.url),
        ("state", state),
        ("fingerprint", view.fingerprint),
        ("teacher", f"{view.teacher}, {view.teacher_dtype}"),
        ("tokenizer", f"{view.tokenizer_ids:,} ids (LM head: {view.head_size:,} rows)"),
        ("estimator", view.estimator),
        ("temperatures", ", ".join(str(temperature) for temperature in view.temperatures)),
        ("units, rows", f"{view.committed:,}, {view.rows:,} ({counts(view.statuses)})"),
        ("tokens", f"{view.tokens:,}, {view.supervised_tokens:,} of them supervised"),
    ]
    if view.bytes_per_supervised_token is None:
        return lines
    worst = ", ".join(f"{value:.1e} nats" for value in view.fidelity or ())
    return [
        *lines,
        ("bytes", f"{view.bytes:,}, {view.bytes_per_supervised_token:.1f} per supervised token"),
        ("stored entries", f"{view.entries_per_supervised_token:.1f} per supervised token"),
        ("coverage", coverage(view.mean_kept_mass)),
        ("entropy", f"{view.mean_entropy:.3f} nats, of the teacher's distribution"),
        ("fidelity", f"KL(exact || stored) at most {worst} in any unit"),
    ]


def coverage(mass: float | None) -> str:
    """How much probability has entries, in words."""
    return f"{mass:.4f} of the probability is stored exactly, on average" if mass else "none: every entry is drawn"


def counts(statuses: dict[str, int]) -> str:
    """`3 empty, 5 ok`."""
    return ", ".join(f"{count:,} {status}" for status, count in statuses.items()) or "none"


def row_title(view: RowView) -> str:
    """One line about a row."""
    return f"row {view.sample_index}, id {view.sample_id}: {view.status}, {view.tokens} tokens"


def odds(token: TokenView) -> str:
    """What the teacher gave the token itself."""
    return "not among the stored entries" if token.p is None else f"p {token.p:.4f}, rank {token.rank}"


def marked(text: str) -> str:
    """Visible text with a mark before each line end, which has no width to be coloured."""
    return visible(text).replace("\n", "\u21b5\n")


def quoted(text: str) -> str:
    """Text in one line, with its blanks and line ends visible: a blank is `BLANK`."""
    return visible(text.replace(BLANK, "\\u2581")).replace("\n", "\\n").replace(" ", BLANK)


def as_json(dump: Dump, rows: Sequence[int]) -> dict[str, Any]:
    """Header, and the rows asked for, for machines: `row` is one, `rows` are several."""
    found: dict[str, Any] = header(dump).model_dump(mode="json")
    views = [view.model_dump(mode="json") for view in row_views(dump, rows)]
    return found | ({"row": views[0]} if len(views) == 1 else {"rows": views} if views else {})
