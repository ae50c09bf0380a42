"""A preview of a corpus for people."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.views.inspect import counts
from pipeline.views.terminal import facts_table
from teacher_dump.corpus.preview import Preview, SampleView

_SHOWN = 600
"""Characters of one stretch of a sample that are shown at its beginning and at its end."""


def show(found: Preview, samples: Sequence[SampleView], console: Console) -> None:
    """Print it: in colours on a terminal, else with `{+...+}` around what is supervised, which survives a pipe."""
    texts = (_text(sample, colour=console.is_terminal) for sample in samples)
    console.print(Group(*_sources(found), _totals(found), *_refusal(found), *texts), soft_wrap=True)


def _sources(found: Preview) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for i, source in enumerate(found.sources):
        used = "" if source.used == source.records else f", {source.used:,} of them used"
        files = "" if source.files is None or source.files == 1 else f" in {source.files:,} files"
        parts.append(Text(f"source {i}: {source.path}", style="bold"))
        parts.append(Text(f"  format {source.format or 'unknown'}; columns {', '.join(source.columns) or '(none)'}"))
        parts.append(Text(f"  {source.records:,} records{files}{used}: {counts(source.statuses)}"))
        if source.unread:
            parts.append(Text(f"  not read, and not known: {', '.join(source.unread)}", style="yellow"))
        parts += [Text(f"  cannot be used: {problem}", style="yellow") for problem in source.problems]
        if source.refused:
            parts.append(Text("  `dump` refuses this: more than corpus.max_bad_share cannot be used", style="red"))
    return parts


def _totals(found: Preview) -> Table:
    how = {
        "marks": "the chat template's own {% generation %} marks",
        "located": "located by rendering the chat template with each answer replaced",
        None: "no chat template needed",
    }
    share = "" if found.supervised_share is None else f" ({found.supervised_share:.1%})"
    rows = {
        "samples": f"{found.samples:,} ({counts(found.statuses)}), {found.duplicates:,} duplicates",
        "mask": f"{found.mask}: {how[found.template]}",
        "BOS token": f"{found.begins_with_bos:,} of {found.samples:,} samples have it, {found.doubled_bos:,} doubled",
        "end of turn": "supervised text ends with "
        + (", ".join(f"{end!r} {count:,} times" for end, count in found.ends.items()) or "nothing"),
        "empty": ", ".join(f"{count:,} {reason}" for reason, count in found.empty.items()) or "no sample",
        "tokens": f"{found.tokens:,}, {found.supervised_tokens:,} of them supervised{share}",
        "per sample": ", ".join(f"{name} {value:,}" for name, value in found.lengths.items()),
        "supervised": ", ".join(f"{name} {value:,}" for name, value in found.supervised_lengths.items()),
        "too long": f"{found.over_max_length:,} samples over max_length {found.max_length:,}",
        "fingerprint": found.fingerprint,
    }
    return facts_table(rows.items())


def _refusal(found: Preview) -> list[Text]:
    said = "`dump` refuses this: samples are too long, and corpus.too_long is error"
    return [Text(said, style="red")] if found.refused else []


def _text(sample: SampleView, *, colour: bool) -> Text:
    cut = "" if sample.length == sample.tokens else f", {sample.length:,} before it was cut"
    text = Text(f"\nsample {sample.sample_index}, id {sample.sample_id}, {sample.source}: {sample.status}, ", "bold")
    text.append(f"{sample.tokens:,} tokens{cut}, {sample.supervised_tokens:,} supervised\n")
    for part, supervised in sample.parts:
        shown = part if len(part) <= 2 * _SHOWN + 40 else f"{part[:_SHOWN]} [...] {part[-_SHOWN:]}"
        if not supervised:
            text.append(shown, "dim" if colour else "")
        else:
            text.append(shown if colour else f"{{+{shown}+}}", "bold green" if colour else "")
    return text
