"""Finished runs as one HTML page that needs nothing else: table, curves, samples token by token, configurations."""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.views.inspect import RowView, row_views, text_pieces, tokenizer_of
from pipeline.views.page import rendered
from pipeline.views.runs import Run, differences, facts
from storage_schemas.common.extras import refuse_missing
from student_train.results.evaluate import Evaluated

INK = "#808080"
"""Of axes and text of a figure: legible on white and on black."""
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "llm-neo", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "font.size": 9, "text.parse_math": False,
}  # fmt: skip
"""Of a figure: its text stays text, a `$` too, and the same runs give the same bytes."""


class StudentToken(NamedTuple):
    """What the student says of one supervised token."""

    p: float
    """Its probability of the token."""
    first: str
    """Its most likely token."""
    first_p: float
    kl: float
    """KL(teacher || student), nats."""


class Sample(NamedTuple):
    """A held-out sample: the teacher's view of it, and the student's of each supervised token."""

    row: RowView
    student: Sequence[StudentToken]


def samples_of(evaluated: Evaluated) -> list[Sample]:
    """The samples of an evaluation that have supervised tokens, in the dump's order."""
    dump, tokens = evaluated.dump, evaluated.tokens
    indices, tokenizer = sorted(set(evaluated.sample.tolist())), tokenizer_of(dump)
    found = []
    for row, index in zip(row_views(dump, indices), indices, strict=True):
        mine = (evaluated.sample == index).nonzero()[0]
        student = [
            StudentToken(
                p=float(tokens.label_p[i]),
                first="".join(text_pieces(tokenizer, [int(tokens.first[i])])),
                first_p=float(tokens.confidence[i]),
                kl=float(tokens.kl[i]),
            )
            for i in mine[evaluated.place[mine].argsort()]
        ]
        found.append(Sample(row, student))
    return found


def run_page(runs: Sequence[Run], samples: Sequence[Sample], *, heldout: str | None) -> str:
    """The page.

    Args:
        runs: one or more; the samples are of the first one.
        samples: of held-out data, beside its student.
        heldout: the dump that they are from.

    Raises:
        MismatchError: matplotlib is not installed.
    """
    return rendered(
        "run_page.html.jinja",
        runs=runs,
        facts=[facts(run) for run in runs],
        differences=differences(runs),
        figures=figures(runs),
        samples=samples,
        heldout=heldout,
    )


def figures(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Title and SVG of each figure, one line per run; evaluations on held-out samples are dots.

    Raises:
        MismatchError: matplotlib is not installed.
    """
    refuse_missing("a page with figures", "matplotlib", extra="report", instead="leave out --html for the table alone")
    import matplotlib
    from matplotlib.figure import Figure

    drawn: list[tuple[str, Callable[[Any], float], str | None]] = [
        ("Divergence from the teacher, nats per token; dots: held-out KL", lambda event: event.kl, "kl"),
        ("Cross-entropy, nats per token", lambda event: event.ce, "ce"),
        ("Tokens per second", lambda event: event.tokens_per_second, None),
        ("Learning rate", lambda event: event.learning_rate, None),
    ]
    found = []
    # A legend leaves out what begins with an underscore; the space before it has no width.
    names = ["\u200b" + (run.name if len(run.name) <= 40 else f"…{run.name[-39:]}") for run in runs]
    with matplotlib.rc_context(STYLE):
        for title, of_event, of_evaluation in drawn:
            figure = Figure(figsize=(5.2, 2.9 + 0.1 * len(runs)), layout="constrained")
            axes = figure.add_subplot()
            for run, short in zip(runs, names, strict=True):
                assert run.config.train is not None
                # What does not distil says 0 of its divergence in training.
                events = run.events if of_evaluation != "kl" or run.config.train.distils else ()
                steps = [event.step for event in events]
                (line,) = axes.plot(steps, [of_event(event) for event in events], linewidth=1, label=short)
                if of_evaluation is not None:
                    held = run.summary.heldout
                    values = [getattr(result, of_evaluation) for result in held]
                    axes.plot([result.step for result in held], values, "o", markersize=4, color=line.get_color())
            axes.set_xlabel("step")
            axes.grid(alpha=0.2)
            if len(runs) > 1:
                figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
            found.append((title, svg(figure)))
    return found


def svg(figure: Any) -> Markup:
    """A matplotlib figure as an element of a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    drawn = out.getvalue()
    return Markup(drawn[drawn.index("<svg") :])
