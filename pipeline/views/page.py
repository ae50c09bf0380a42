"""A dump as one HTML page that needs nothing else: header, legend, coloured text, and a table of tokens per row.

Its text is in `page.html.jinja`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.views.inspect import (
    SHADES,
    TOP,
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


def page(dump: Dump, rows: Sequence[int]) -> str:
    """The page of a dump and of some of its rows.

    Raises:
        UsageError: there is no such row.
        DataError: its unit is not committed, or damaged.
    """
    view = header(dump)
    return rendered(
        "page.html.jinja",
        title=f"Teacher distributions in {view.url}",
        header=header_lines(view),
        rows=row_views(dump, rows),
        top=TOP,
    )


def rendered(template: str, **values: Any) -> str:
    """A page from a template in this folder. What it is given is escaped; `shades` are the colours of tokens."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters |= {
        "by_position": lambda row: {token.position: token for token in row.supervised},
        "marked": marked,
        "quoted": quoted,
        "row_title": row_title,
        "shade": shade,
        "tip": _tip,
        "visible": visible,
    }
    return environment.get_template(template).render(shades=SHADES, **values)


def _tip(token: TokenView) -> str:
    """What is said about a token under the pointer."""
    top = "\n".join(f"{p:.4f}  {quoted(text)}" for text, p in token.top)
    return f"{token.position}: {quoted(token.token)}   {odds(token)}, entropy {token.entropy:.2f} nats\n{top}"
