"""What a dump holds, for people: its header from the records alone, and single rows as a table of tokens."""

import math
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from storage_schemas.commit import count_statuses, mean_per_token, totals
from storage_schemas.errors import UsageError
from storage_schemas.reader import Dump
from storage_schemas.rows import OK, Row
from storage_schemas.section import Section
from storage_schemas.shift import supervised_positions
from storage_schemas.targets import Decoded, decode

TOP = 5


class Header(Section):
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


class TokenView(Section):
    """One supervised token of a row."""

    position: int
    """Place of the token in the sample."""
    context: str
    """The token before it, whose logits predict it."""
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


class RowView(Section):
    """One row."""

    sample_index: int
    sample_id: str
    status: str
    text: str
    tokens: int
    supervised: list[TokenView]


def header(dump: Dump) -> Header:
    """The dump as a whole, from run.json and the commit records; no data file is read."""
    run, records = dump.run, dump.records()
    sums = totals(records)
    supervised, size = sums["supervised_tokens"], sums["bytes"]
    entries = sum(record.entries for record in records.values())
    parameters = run.estimator.model_dump(exclude={"kind"})
    worst = (
        [max(record.fidelity[i] for record in records.values()) for i in range(len(run.temperatures))]
        if records
        else None
    )
    return Header(
        url=dump.store.url,
        fingerprint=dump.fingerprint,
        sealed=dump.sealed(),
        teacher=run.teacher.model + (f" @ {run.teacher.revision}" if run.teacher.revision else ""),
        teacher_dtype=run.teacher.dtype,
        tokenizer_ids=run.tokenizer.vocab_size,
        head_size=run.teacher.head_size,
        estimator=f"{run.estimator.kind} ({', '.join(f'{key} {value}' for key, value in parameters.items())})",
        temperatures=run.temperatures,
        units=run.units,
        committed=len(records),
        statuses=count_statuses(records),
        entries_per_supervised_token=entries / supervised if supervised else None,
        bytes_per_supervised_token=size / supervised if supervised else None,
        mean_kept_mass=mean_per_token(records, "mean_kept_mass"),
        mean_entropy=mean_per_token(records, "mean_entropy"),
        fidelity=None if worst is None else tuple(worst),
        **sums,
    )


def row_view(dump: Dump, sample_index: int) -> RowView:
    """One row, decoded with the dump's own tokenizer.

    Raises:
        UsageError: there is no such sample.
        DataError: its unit is not committed, or damaged.
    """
    samples = dump.run.corpus.samples
    if not 0 <= sample_index < samples:
        raise UsageError("no such row in this dump", got=sample_index, expected=f"0 to {samples - 1}")
    unit = sample_index // dump.run.samples_per_unit
    row = dump.read_unit(unit).row(sample_index - dump.run.unit_range(unit).start)
    tokenizer = _tokenizer(dump)
    text = _text(tokenizer, row.input_ids.tolist())
    return RowView(
        sample_index=row.sample_index,
        sample_id=row.sample_id,
        status=row.status,
        text=text,
        tokens=len(row.input_ids),
        supervised=_token_views(row, dump, tokenizer),
    )


def _token_views(row: Row, dump: Dump, tokenizer: Tokenizer | None) -> list[TokenView]:
    if row.status != OK or row.targets is None:
        return []
    positions = supervised_positions(row.loss_mask)
    decoded = decode(row.targets, temperature_index=dump.run.temperature_index(1.0))
    views = []
    for i, (token, before) in enumerate(zip(positions.tokens, positions.logits, strict=True)):
        filled = int(row.targets.lengths[i])
        ids, p = decoded.ids[i, :filled], np.exp(decoded.logprobs[i, :filled].astype(np.float64))
        order = np.argsort(-p, kind="stable")
        label = int(row.input_ids[token])
        found = np.flatnonzero(ids[order] == label)
        views.append(
            TokenView(
                position=int(token),
                context=_text(tokenizer, [int(row.input_ids[before])]),
                token=_text(tokenizer, [label]),
                rank=int(found[0]) + 1 if found.size else None,
                p=float(p[order][found[0]]) if found.size else None,
                top=[(_text(tokenizer, [int(ids[j])]), float(p[j])) for j in order[:TOP]],
                mass=float(p[decoded.in_head[i, :filled]].sum()),
                entropy=_entropy(decoded, i),
            )
        )
    return views


def _entropy(decoded: Decoded, i: int) -> float:
    """Entropy in nats of a token's weights; what no entry stands for counts as one event."""
    weights = decoded.weights[i].astype(np.float64)
    rest = max(0.0, 1.0 - float(weights.sum()))
    return float(-sum(w * math.log(w) for w in [*weights.tolist(), rest] if w > 0))


def _tokenizer(dump: Dump) -> Tokenizer | None:
    content = dump.tokenizer_files().get("tokenizer.json")
    return None if content is None else Tokenizer.from_str(content.decode())


def _text(tokenizer: Tokenizer | None, ids: list[int]) -> str:
    """The text of some ids; `<id>` for each that the tokenizer does not know."""
    if tokenizer is None:
        return " ".join(f"<{token}>" for token in ids)
    if len(ids) == 1 and tokenizer.id_to_token(ids[0]) is None:
        return f"<{ids[0]}>"
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def header_table(view: Header) -> Table:
    """The header for a terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def add(name: str, value: object) -> None:
        table.add_row(name, Text(str(value)))

    state = "sealed" if view.sealed else f"not sealed: {view.committed} of {view.units} units committed"
    add("dump", view.url)
    add("state", state)
    add("fingerprint", view.fingerprint)
    add("teacher", f"{view.teacher}, {view.teacher_dtype}")
    add("tokenizer", f"{view.tokenizer_ids:,} ids (LM head: {view.head_size:,} rows)")
    add("estimator", view.estimator)
    add("temperatures", ", ".join(str(temperature) for temperature in view.temperatures))
    add("units, rows", f"{view.committed:,}, {view.rows:,} ({counts(view.statuses)})")
    add("tokens", f"{view.tokens:,}, {view.supervised_tokens:,} of them supervised")
    if view.bytes_per_supervised_token is not None:
        add("bytes", f"{view.bytes:,}, {view.bytes_per_supervised_token:.1f} per supervised token")
        add("stored entries", f"{view.entries_per_supervised_token:.1f} per supervised token")
        add("head mass", f"{view.mean_kept_mass:.4f} on average; the teacher's entropy is {view.mean_entropy:.3f} nats")
        worst = ", ".join(f"{value:.1e} nats" for value in view.fidelity or ())
        add("fidelity", f"KL(exact || stored) at most {worst} in any unit")
    return table


def counts(statuses: dict[str, int]) -> str:
    """`3 empty, 5 ok`."""
    return ", ".join(f"{count:,} {status}" for status, count in statuses.items()) or "none"


def row_table(view: RowView) -> RenderableType:
    """A row for a terminal."""
    title = f"row {view.sample_index}, id {view.sample_id}: {view.status}, {view.tokens} tokens"
    table = Table()
    for name in ("pos", "after", "token", "rank", "p", f"top {TOP}", "mass", "H"):
        table.add_column(name, justify="right" if name in ("pos", "rank", "p", "mass", "H") else "left")
    for token in view.supervised:
        top = "  ".join(f"{_quoted(text)}:{p:.3f}" for text, p in token.top)
        p = "-" if token.p is None else f"{token.p:.4f}"
        rank = "-" if token.rank is None else str(token.rank)
        cells = [str(token.position), _quoted(token.context), _quoted(token.token), rank, p, top]
        table.add_row(*(Text(cell) for cell in [*cells, f"{token.mass:.4f}", f"{token.entropy:.2f}"]))
    return Group(Text(title, style="bold"), Text(view.text), table)


def _quoted(text: str) -> str:
    """Text with its blanks and line ends visible."""
    return repr(text)[1:-1].replace(" ", "_") if text.isprintable() else repr(text)[1:-1]


def as_json(dump: Dump, row: int | None) -> dict[str, Any]:
    """Header, and a row if asked for, for machines."""
    found: dict[str, Any] = header(dump).model_dump(mode="json")
    return found if row is None else {**found, "row": row_view(dump, row).model_dump(mode="json")}


def show(dump: Dump, row: int | None, console: Console) -> None:
    """Print header, and a row if asked for."""
    # First everything that may fail.
    parts = [header_table(header(dump)), *([] if row is None else [row_table(row_view(dump, row))])]
    for part in parts:
        console.print(part)
