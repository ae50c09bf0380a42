"""Instruction data that every machine has: questions and answers from the docstrings of Python's standard library.

Sources are parsed, never imported. The result depends on the source files alone: modules and names are visited in
sorted order, and every choice (question, split, selection) is made by a hash of the name.
"""

import ast
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MIN_CHARACTERS, MAX_CHARACTERS = 60, 480
"""Length of an answer; 480 characters of English are about 110 tokens. Longer docstrings are cut, see `shorten`."""
HELDOUT_SHARE = 0.125
"""Share of the top-level modules, not of the samples, that training never sees."""
MODULE_SHARE = 0.0625
"""Share of the samples of a split that one top-level module may have: a few large ones would drown the rest."""
SKIPPED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
"""Directories of the standard library that hold no library, or nobody's."""

QUESTIONS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Give me a short introduction to Python's `{name}` module.",
        "When would I import `{name}` in Python?",
    ),
    "class": (
        "What is `{name}` in Python's standard library?",
        "Explain the class `{name}` of Python.",
        "What does an instance of Python's `{name}` represent?",
    ),
    "function": (
        "What does `{name}({arguments})` do in Python?",
        "Explain the Python function `{name}`.",
        "How does `{name}({arguments})` of Python's standard library behave?",
        "I found a call of `{name}` in some Python code. What is it good for?",
    ),
}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Pair(NamedTuple):
    """One question and its answer."""

    name: str
    """Dotted name of what is documented, such as `json.JSONEncoder.default`."""
    question: str
    answer: str

    @property
    def module(self) -> str:
        """Top-level module or package."""
        return self.name.partition(".")[0]

    def record(self) -> dict[str, object]:
        """A line of the corpus in the `messages` format."""
        turns = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return {"id": self.name, "messages": turns}


def number(*parts: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6], "big") / 2**48


def docstring_pairs(root: Path) -> list[Pair]:
    """A pair per documented public module, class, function and method under `root`, sorted by name; no answer twice."""
    pairs: dict[str, Pair] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or any(part.startswith("_") or part in SKIPPED for part in parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for pair in _documented(tree, ".".join(parts)):
            pairs.setdefault(pair.answer, pair)
    return sorted(pairs.values())


def _documented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[Pair]:
    kind = "module" if isinstance(node, ast.Module) else "class"
    yield from _pair(node, name, kind)
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _pair(child, f"{name}.{child.name}", "function")


def _pair(node: Documented, name: str, kind: str) -> Iterator[Pair]:
    answer = shorten(inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))
    # A docstring that breaks off before its list or example, or is one long example, answers no question.
    if len(answer) < MIN_CHARACTERS or answer.endswith(":") or ">>>" in answer or not answer.isascii():
        return
    arguments = ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments = ", ".join(a.arg for a in every if a.arg not in ("self", "cls"))
    choices = QUESTIONS[kind]
    yield Pair(
        name, choices[int(number("question", name) * len(choices))].format(name=name, arguments=arguments), answer
    )


def shorten(text: str) -> str:
    """The text up to the end of the last paragraph, else sentence, within MAX_CHARACTERS; empty if there is none."""
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    head = text[: MAX_CHARACTERS + 1]
    paragraph, sentence = head.rfind("\n\n"), max(head.rfind(". "), head.rfind(".\n"))
    if paragraph >= MIN_CHARACTERS:
        return head[:paragraph].rstrip()
    return head[: sentence + 1]


def is_heldout(pair: Pair) -> bool:
    """Whether the pair's whole top-level module is held out."""
    return number("split", pair.module) < HELDOUT_SHARE


def split(pairs: Iterable[Pair], train: int, heldout: int) -> tuple[list[Pair], list[Pair]]:
    """At most `train` and `heldout` pairs from disjoint sets of modules, chosen and ordered by hash."""
    ordered = sorted(pairs, key=lambda pair: number("order", pair.name))
    kept_out = [pair for pair in ordered if is_heldout(pair)]
    seen = [pair for pair in ordered if not is_heldout(pair)]
    return _spread(seen, train), _spread(kept_out, heldout)


def _spread(pairs: Iterable[Pair], count: int) -> list[Pair]:
    """The first `count` pairs of which no top-level module has more than its share."""
    per_module: Counter[str] = Counter()
    chosen = []
    for pair in pairs:
        per_module[pair.module] += 1
        if per_module[pair.module] <= max(1, count * MODULE_SHARE):
            chosen.append(pair)
    return chosen[:count]


def jsonl(pairs: Iterable[Pair]) -> str:
    """The corpus file."""
    return "".join(json.dumps(pair.record()) + "\n" for pair in pairs)
