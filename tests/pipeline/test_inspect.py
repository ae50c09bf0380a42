"""Rows of a dump for people: text and colours on a terminal and in HTML, whatever a sample holds."""

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from rich.console import Console
from support.dumps import random_targets, some_provenance
from support.tiny_teachers import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models

from pipeline import cli
from pipeline.views import inspect as show
from pipeline.views import page, terminal
from storage_schemas.config import Sampled
from storage_schemas.reader import Dump
from storage_schemas.rows import NONFINITE, OK, Row
from storage_schemas.writer import DumpWriter

NASTY = "<script>alert(1)</script>"
TEXTS = [
    f"how is {NASTY} & \"the\" 'other' [red]one[/red]?\nanswer \x1b[2J<b>",
    "na\u00efve caf\u00e9 \U0001f600 \u202eanswer",
    "what is the answer",
]
PROMPT = 2
HEAD = 330


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.add_tokens([NASTY])
    return found


def make(folder: Path, tokenizer, **changes) -> Dump:
    provenance = some_provenance(samples=len(TEXTS) + 1, samples_per_unit=2, lm_head_rows=HEAD, **changes)
    writer = DumpWriter.open(str(folder / "dump"), provenance)
    tokenizer.save_pretrained(folder / "tokenizer")
    writer.put_tokenizer({path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()})
    rows = [row(provenance, i, tokenizer.encode(text)) for i, text in enumerate([*TEXTS, "nothing here"])]
    for unit in range(provenance.units):
        writer.commit_unit(unit, [rows[i] for i in provenance.unit_range(unit)])
    assert writer.seal()
    return Dump.open(str(folder / "dump"))


def row(provenance, index: int, ids: list[int]) -> Row:
    mask = np.arange(len(ids)) >= PROMPT
    status = NONFINITE if index == len(TEXTS) else OK
    logits = np.random.default_rng(index).normal(0, 3, (int(mask.sum()), HEAD))
    # The label is anything from certain to impossible.
    logits[np.arange(len(logits)), np.array(ids)[mask]] += np.linspace(-4, 14, len(logits))
    targets = random_targets(provenance, logits, seed=index) if status == OK else None
    return Row(
        sample_index=index,
        sample_id=f"<img src=x onerror=alert({index})>",
        status=status,
        input_ids=np.array(ids, np.int32),
        loss_mask=mask,
        targets=targets,
    )


@pytest.fixture(scope="module")
def dump(tmp_path_factory, tokenizer) -> Dump:
    return make(tmp_path_factory.mktemp("show"), tokenizer)


class Parsed(HTMLParser):
    """Elements of a page that the tests ask for; an element that is never closed leaves `open` unequal."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.tokens: list[dict] = []
        self.cells: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def inside(self, tag: str, kind: str) -> bool:
        return any(name == tag and kind in (attributes.get("class") or "").split() for name, attributes in self.open)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag in self.VOID:
            return
        self.open.append((tag, dict(attrs)))
        if self.inside("div", "text"):
            if tag == "div":
                self.texts.append("")
            if tag == "a":
                self.tokens.append(dict(attrs) | {"text": ""})
        if self.inside("table", "tokens") and tag == "tr":
            self.cells.append([])
        if tag == "td" and self.inside("table", "tokens"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.inside("div", "text"):
            self.texts[-1] += data
            if self.open[-1][0] == "a":
                self.tokens[-1]["text"] += data
        if self.inside("table", "tokens") and any(tag == "td" for tag, _ in self.open):
            self.cells[-1][-1] += data


def test_pieces_are_the_text_cut_at_tokens(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = show.text_pieces(tokenizer.backend_tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text
    # An emoji is four tokens here: it stands where it is complete.
    assert show.text_pieces(tokenizer.backend_tokenizer, tokenizer.encode("\U0001f600")) == ["", "", "", "\U0001f600"]


def test_pieces_of_what_is_no_text(tokenizer):
    backend, (smile, *_, last) = tokenizer.backend_tokenizer, tokenizer.encode("\U0001f600")
    assert show.text_pieces(backend, [smile, 100_000, last]) == ["\ufffd", "<100000>", "\ufffd"]
    assert show.text_pieces(backend, [smile]) == ["\ufffd"]
    # No character has more than four bytes.
    assert [piece.count("\ufffd") for piece in show.text_pieces(backend, [smile] * 9)] == [0, 0, 0, 4, 0, 0, 0, 4, 1]
    assert show.text_pieces(None, [5, 6]) == ["<5>", "<6>"]


def test_blanks_stay_where_a_tokenizer_drops_them_at_the_beginning():
    """As SentencePiece tokenizers do: alone, "the" and " the" decode to the same text."""
    words = {word: i for i, word in enumerate(["<unk>", "\u2581the", "the", "\u2581cat"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    assert show.text_pieces(backend, [1, 3, 1, 2]) == ["the", " cat", " the", "the"]
    assert [show._text_after(backend, 3, token) for token in (1, 2)] == [" the", "the"]


def test_context_is_the_text_before_the_token(dump):
    view = show.row_views(dump, [2])[0]
    assert view.text == TEXTS[2]
    for token in view.supervised:
        assert token.context == "".join(view.pieces[max(0, token.position - 6) : token.position])
        assert token.token == view.pieces[token.position]


def test_colours_follow_the_probability_of_the_token(dump):
    view = show.row_views(dump, [0])[0]
    text = terminal.coloured_text(view)
    known = [token for token in view.supervised if token.p is not None]
    assert len({show.shade(token.p) for token in view.supervised}) >= 4
    assert known
    assert len(known) < len(view.supervised)
    for step, nearly, place in ((0.9, 0.8999, 0), (0.5, 0.4999, 1), (0.1, 0.0999, 2), (0.01, 0.0099, 3), (0.0, 0, 4)):
        assert show.shade(step) == place
        assert show.shade(nearly) == min(place + 1, 4)
    assert show.shade(None) == 5
    supervised = {token.position: token for token in view.supervised}
    styles = [span.style for span in text.spans]
    spans = [piece for piece in view.pieces if piece]
    assert len(spans) == len(view.pieces) == len(styles)
    for position, style in enumerate(styles):
        token = supervised.get(position)
        assert style == ("dim" if token is None else terminal._STYLES[show.shade(token.p)])


def test_the_terminal_shows_text_legend_and_table(dump):
    screen = StringIO()
    terminal.show(dump, [0, 1, 3], Console(file=screen, force_terminal=True, color_system="truecolor", width=240))
    shown = screen.getvalue()
    for name in ("position", "context", "next token", "rank", "top 5", "coverage", "entropy", "p at least 0.9"):
        assert name in shown
    assert "nonfinite" in shown
    # Markup of rich is text here, and neither the terminal nor the reader's eye is turned around.
    assert "\\x1b" in shown
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    plain = StringIO()
    terminal.show(dump, [0], Console(file=plain, width=240))
    assert show.visible(TEXTS[0]).split("\n")[0] in plain.getvalue()
    assert "[red]" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_of_any_width_cuts_nothing(dump, width):
    screen = StringIO()
    terminal.show(dump, [0, 1], Console(file=screen, width=width))
    shown = screen.getvalue()
    assert "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= width
    tokens = [token for view in show.row_views(dump, [0, 1]) for token in view.supervised]
    assert all(f"{token.mass:.4f}" in shown for token in tokens)
    if width == 80:
        for token in tokens:
            assert f"{show.quoted(token.token)}  {show.odds(token)}" in shown
            assert all(f"{show.quoted(text)}:{p:.3f}" in shown for text, p in token.top)


def test_a_blank_is_not_taken_for_a_character_of_the_text():
    assert show.quoted(" a_b \u2581\n") == "\u2581a_b\u2581\\u2581\\n"


def test_the_page_holds_what_the_views_hold(dump):
    text = page.page(dump, [0, 1, 2, 3])
    parsed = Parsed(text)
    views = show.row_views(dump, [0, 1, 2, 3])
    assert parsed.texts == [show.visible(view.text).replace("\n", "\u21b5\n") for view in views]
    tokens = [token for view in views for token in view.supervised]
    assert [token["class"] for token in parsed.tokens] == [f"s{show.shade(token.p)}" for token in tokens]
    cells = [row for row in parsed.cells if row]
    assert len(cells) == len(parsed.tokens) == len(tokens)
    for token, drawn, row in zip(tokens, parsed.tokens, cells, strict=True):
        assert row[0] == str(token.position)
        assert row[1:3] == [show.quoted(token.context), show.quoted(token.token)]
        assert row[3:5] == (["-", "-"] if token.p is None else [str(token.rank), f"{token.p:.4f}"])
        assert row[5] == "".join(f"{show.quoted(text)} {p:.3f}" for text, p in token.top)
        assert row[6:] == [f"{token.mass:.4f}", f"{token.entropy:.2f}"]
        assert f"{token.position}: {show.quoted(token.token)}" in drawn["data-tip"]
        assert drawn["data-tip"].count("\n") == len(token.top)
    for name, value in show.header_lines(show.header(dump)):
        assert name in text
        assert escape(value) in text


def test_the_page_is_alone_and_nothing_in_a_sample_becomes_markup(dump):
    text = page.page(dump, [0, 1, 2, 3])
    parsed = Parsed(text)
    assert not {"script", "img", "b", "link", "iframe"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in parsed.attributes if name == "href")
    assert "http" not in text
    assert NASTY in parsed.texts[0]
    assert NASTY in [token["text"] for token in parsed.tokens]
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<img src=x onerror=alert(3)>" not in text


def test_of_draws_only_drawn_tokens_have_a_probability(tmp_path, tokenizer):
    dump = make(tmp_path, tokenizer, estimator=Sampled(kind="sampled", draws=20))
    view = show.row_views(dump, [0])[0]
    parsed = Parsed(page.page(dump, [0]))
    unknown = [token.position for token in view.supervised if token.p is None]
    assert unknown
    assert len(unknown) < len(view.supervised)
    assert all(token.mass == 0 for token in view.supervised)
    assert not [token for token in view.supervised if f"{token.entropy:.2f}".startswith("-")]
    assert ("coverage", "none: every entry is drawn") in show.header_lines(show.header(dump))
    drawn = {int(token["href"].rpartition("-")[2]): token["class"] for token in parsed.tokens}
    assert [position for position, shade in drawn.items() if shade == "s5"] == unknown


def test_rows_and_page_from_the_command_line(dump, tmp_path, call):
    url, file = dump.store.url, tmp_path / "new" / "page.html"

    code, out, _ = call("inspect", url, "--row", 2, "--row", 0, "--row", 2, "--html", file, "--json")
    assert code == 0
    assert [row["sample_index"] for row in json.loads(out)["rows"]] == [2, 0]
    assert len(Parsed(file.read_text(encoding="utf-8")).texts) == 2
    assert file.read_text(encoding="utf-8") == page.page(dump, [2, 0])
    code, out, _ = call("inspect", url, "--html", tmp_path / "header.html")
    assert code == 0
    assert "header.html" in out
    assert not Parsed((tmp_path / "header.html").read_text()).texts
    (tmp_path / "taken").write_text("")
    code, out, err = call("inspect", url, "--html", tmp_path / "taken" / "page.html")
    assert (code, out) == (64, "")
    assert "cannot write" in err


def test_errors_do_not_command_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a file of a stranger says may be in an error, such as the names of its fields."""
    (tmp_path / "run.json").write_text(json.dumps({"format_version": 1, "\x1b]0;title\x07\u202e": 1}))
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", str(tmp_path)])
    told = capfd.readouterr().err
    assert left.value.code == 65
    assert r"\x1b]0;title\x07\u202e" in told
    assert all(character == "\n" or character.isprintable() for character in told)
