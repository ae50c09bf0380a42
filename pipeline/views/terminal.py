"""A dump on a terminal: its header, and rows as coloured text and their tokens."""

from collections.abc import Iterable, Sequence

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipeline.views.inspect import (
    SHADES,
    TOP,
    RowView,
    TokenView,
    header,
    header_lines,
    marked,
    odds,
    quoted,
    row_title,
    row_views,
    shade,
)
from storage_schemas.common.secrets import visible
from storage_schemas.reader import Dump

_STYLES = [Style(color=step.foreground, bgcolor=step.background) for step in SHADES]
_CONTEXT_WIDTH = 24
_TABLE_WIDTH = 120
"""Columns of a terminal from which on tokens are a table."""


def show(dump: Dump, rows: Sequence[int], console: Console) -> None:
    """Print the header, and the rows asked for."""
    # First everything that may fail.
    facts = facts_table((name, visible(value)) for name, value in header_lines(header(dump)))
    tokens = token_table if console.width >= _TABLE_WIDTH else token_lines
    for part in (facts, *(row_block(view, tokens(view)) for view in row_views(dump, rows))):
        console.print(part)


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and what there is to say of each, without lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def row_block(view: RowView, tokens: RenderableType) -> RenderableType:
    """A row: title, coloured text, and its supervised tokens as they are drawn."""
    title = Text(visible(row_title(view)), style="bold")
    if not view.supervised:
        return Group("", title, coloured_text(view))
    return Group("", title, legend(), coloured_text(view), tokens)


def legend() -> Columns:
    """What the colours mean."""
    steps = [Text(f" {step.label} ", style) for step, style in zip(SHADES, _STYLES, strict=True)]
    return Columns([*steps, Text("not supervised", "dim")])


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
    """The supervised tokens, one row each. Long ones take several lines; nothing is cut."""
    table = Table()
    for name in ("position", "context", "next token", "rank", "p", f"top {TOP}", "coverage", "entropy"):
        number = name in ("position", "rank", "p", "coverage", "entropy")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for token in view.supervised:
        context = quoted(token.context)
        table.add_row(
            str(token.position),
            Text(context if len(context) <= _CONTEXT_WIDTH else "..." + context[3 - _CONTEXT_WIDTH :]),
            _token(token),
            "-" if token.rank is None else str(token.rank),
            "-" if token.p is None else f"{token.p:.4f}",
            _top(token),
            f"{token.mass:.4f}" if token.mass else "-",
            f"{token.entropy:.2f}",
        )
    return table


def token_lines(view: RowView) -> Table:
    """The same for a narrow terminal, where the running text above has to do for the context."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(justify="right", no_wrap=True)
    lines.add_column(overflow="fold")
    for token in view.supervised:
        covered = f"coverage {token.mass:.4f}, " if token.mass else ""
        said = f"  {odds(token)}, {covered}entropy {token.entropy:.2f}"
        lines.add_row(str(token.position), Group(Text.assemble(_token(token), said), _top(token)))
    return lines


def _token(token: TokenView) -> Text:
    return Text(quoted(token.token), _STYLES[shade(token.p)])


def _top(token: TokenView) -> Text:
    return Text("  ".join(f"{quoted(text)}:{p:.3f}" for text, p in token.top))
