"""A dump as one HTML page that needs nothing else: header, legend, coloured text, and a table of tokens per row."""

from collections.abc import Sequence

from jinja2 import Environment

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

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title | visible }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem 7rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; } h1, h2 { overflow-wrap: anywhere; }
table { border-collapse: collapse; } th, td { padding: .2rem .6rem; vertical-align: top; text-align: left; }
.header th { font-weight: 600; white-space: nowrap; } .header td { overflow-wrap: anywhere; }
.legend { line-height: 2; } .legend span, .text { border-radius: 4px; }
.legend span { display: inline-block; line-height: 1.4; padding: .1rem .5rem; margin-right: .3rem; }
.text, .token, .context, .top { font-family: ui-monospace, monospace; font-size: .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.text { border: 1px solid var(--line); padding: .8rem; line-height: 1.7; }
.dim { opacity: .55; }
.text a { text-decoration: none; border-radius: 2px; }
.text a:hover, .text a:focus { outline: 2px solid currentColor; }
.text a:hover::after, .text a:focus::after { content: attr(data-tip); position: fixed; left: 1rem; bottom: 1rem;
  max-width: calc(100vw - 4rem); padding: .6rem .9rem; border-radius: 6px; background: #1c1c1c; color: #fff;
  white-space: pre-wrap; overflow-wrap: anywhere; z-index: 2; box-shadow: 0 2px 12px #0008; }
.tokens { margin-top: 1rem; width: 100%; font-variant-numeric: tabular-nums; }
.tokens thead th { position: sticky; top: 0; background: Canvas; border-bottom: 2px solid var(--line); }
.tokens td { border-bottom: 1px solid var(--line); } .tokens tr:target td { background: #fc03; }
.n { text-align: right; } .token { min-width: 8.5rem; } .token span { padding: .05rem .3rem; border-radius: 3px; }
.top span { display: inline-block; margin-right: .5rem; padding: 0 .3rem; background: var(--soft); border-radius: 3px; }
@media (max-width: 52rem) {
  .tokens, .tokens tbody, .tokens td { display: block; } .tokens thead { display: none; }
  .tokens tr { display: flex; flex-wrap: wrap; gap: .1rem .8rem; padding: .5rem .2rem;
    border-bottom: 1px solid var(--line); }
  .tokens td { padding: 0; border: 0; min-width: 0; } .tokens .top { flex-basis: 100%; order: 1; }
  .tokens .n { white-space: nowrap; } .tokens .n::before { content: attr(data-name) " "; opacity: .6; }
}
{% for step in shades %}
.s{{ loop.index0 }} { background: {{ step.background }}; color: {{ step.foreground }}; }
{% endfor %}
</style>
</head>
<body>
<h1>{{ title | visible }}</h1>
<table class="header">
{% for name, value in header %}
<tr><th>{{ name }}</th><td>{{ value | visible }}</td></tr>
{% endfor %}
</table>
{% for row in rows %}
<section id="row{{ row.sample_index }}">
<h2>{{ row | row_title | visible }}</h2>
{% set supervised = row | by_position %}
{% if supervised %}
<p class="legend">The teacher's probability of each supervised token:
{% for step in shades %}
<span class="s{{ loop.index0 }}">{{ step.label }}</span>
{% endfor %}
<span class="dim">not supervised</span></p>
{% endif %}
<div class="text">
{%- for piece in row.pieces -%}
{%- set token = supervised[loop.index0] -%}
{%- if token -%}
<a href="#row{{ row.sample_index }}-{{ token.position }}" class="s{{ token.p | shade }}" data-tip="{{ token | tip }}">
{{- piece | marked -}}
</a>
{%- else -%}
<span class="dim">{{ piece | visible }}</span>
{%- endif -%}
{%- endfor -%}
</div>
{% if supervised %}
<table class="tokens">
<thead><tr><th class="n">position</th><th>context</th><th>next token</th><th class="n">rank</th><th class="n">p</th>
<th>top {{ top }}</th><th class="n">coverage</th><th class="n">entropy</th></tr></thead>
<tbody>
{% for token in row.supervised %}
<tr id="row{{ row.sample_index }}-{{ token.position }}"><td class="n" data-name="position">{{ token.position }}</td>
<td class="context">{{ token.context | quoted }}</td>
<td class="token"><span class="s{{ token.p | shade }}">{{ token.token | quoted }}</span></td>
<td class="n" data-name="rank">{{ "-" if token.rank is none else token.rank }}</td>
<td class="n" data-name="p">{{ "-" if token.p is none else "%.4f" | format(token.p) }}</td>
<td class="top">
{%- for text, p in token.top -%}
<span>{{ text | quoted }} {{ "%.3f" | format(p) }}</span>
{%- endfor -%}
</td>
<td class="n" data-name="coverage">{{ "%.4f" | format(token.mass) }}</td>
<td class="n" data-name="entropy">{{ "%.2f" | format(token.entropy) }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
</section>
{% endfor %}
</body>
</html>
"""


def page(dump: Dump, rows: Sequence[int]) -> str:
    """The page of a dump and of some of its rows.

    Raises:
        UsageError: there is no such row.
        DataError: its unit is not committed, or damaged.
    """
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters |= {
        "by_position": lambda row: {token.position: token for token in row.supervised},
        "marked": marked,
        "quoted": quoted,
        "row_title": row_title,
        "shade": shade,
        "tip": _tip,
        "visible": visible,
    }
    view = header(dump)
    return environment.from_string(_PAGE).render(
        title=f"Teacher distributions in {view.url}",
        header=header_lines(view),
        rows=row_views(dump, rows),
        shades=SHADES,
        top=TOP,
    )


def _tip(token: TokenView) -> str:
    """What is said about a token under the pointer."""
    top = "\n".join(f"{p:.4f}  {quoted(text)}" for text, p in token.top)
    return f"{token.position}: {quoted(token.token)}   {odds(token)}, entropy {token.entropy:.2f} nats\n{top}"
