"""A dump on a terminal: its header, and rows as coloured text and a table of tokens."""

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipeline.views.inspect import (
    SHADES,
    TOP,
    RowView,
    header,
    header_lines,
    marked,
    quoted,
    row_title,
    row_views,
    shade,
)
from storage_schemas.common.secrets import visible
from storage_schemas.reader import Dump

_STYLES = [Style(color=step.foreground, bgcolor=step.background) for step in SHADES]
_CONTEXT_WIDTH = 24


def show(dump: Dump, rows: Sequence[int], console: Console) -> None:
    """Print the header, and the rows asked for."""
    # First everything that may fail.
    facts = facts_table((name, visible(value)) for name, value in header_lines(header(dump)))
    for part in (facts, *map(row_block, row_views(dump, rows))):
        console.print(part)


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and what there is to say of each, without lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def row_block(view: RowView) -> RenderableType:
    """A row: title, coloured text, and a table of its supervised tokens."""
    title = Text(visible(row_title(view)), style="bold")
    if not view.supervised:
        return Group("", title, coloured_text(view))
    return Group("", title, legend(), coloured_text(view), token_table(view))


def legend() -> Text:
    """What the colours mean."""
    line = Text()
    for step, style in zip(SHADES, _STYLES, strict=True):
        line.append(f" {step.label} ", style).append(" ")
    return line.append("not supervised", "dim")


def coloured_text(view: RowView) -> Text:
    """The running text: supervised tokens coloured by the teacher's probability of them, the others dim."""
    supervised = {token.position: token for token in view.supervised}
    text = Text()
    for position, piece in enumerate(view.pieces):
        token = supervised.get(position)
        if token is None:
            text.append(visible(piece), "dim")
        else:
            text.append(marked(piece), _STYLES[shade(token.p)])
    return text


def token_table(view: RowView) -> Table:
    """The supervised tokens, one line each."""
    table = Table()
    for name in ("position", "context", "next token", "rank", "p", f"top {TOP}", "coverage", "entropy"):
        table.add_column(name, justify="right" if name in ("position", "rank", "p", "coverage", "entropy") else "left")
    for token in view.supervised:
        top = "  ".join(f"{quoted(text)}:{p:.3f}" for text, p in token.top)
        context = quoted(token.context)
        context = context if len(context) <= _CONTEXT_WIDTH else "..." + context[3 - _CONTEXT_WIDTH :]
        table.add_row(
            str(token.position),
            Text(context),
            Text(quoted(token.token), style=_STYLES[shade(token.p)]),
            "-" if token.rank is None else str(token.rank),
            "-" if token.p is None else f"{token.p:.4f}",
            Text(top),
            f"{token.mass:.4f}",
            f"{token.entropy:.2f}",
        )
    return table
