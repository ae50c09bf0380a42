"""docs/api.md, from what the packages export (`__all__`) and their docstrings."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

PACKAGES = ("storage_schemas", "teacher_dump", "student_train", "pipeline")
HEAD = """# Python API

What the packages export; everything else may change without notice. `storage_schemas` needs no torch.

This page is generated from the docstrings by `python docs/generate.py`.
"""
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")
_ITEM = re.compile(r"(\*{0,2}[\w.]+): (.*)")


def api_page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name in PACKAGES:
        package = importlib.import_module(name)
        names = getattr(package, "__all__", ())
        lines.append(f"\n## `{name}`\n\n{prose(package.__doc__)}")
        if not names:
            lines.append("\nExports nothing; it is used from the command line.")
        for exported in names:
            lines += entry(exported, getattr(package, exported))
    return "\n".join(lines) + "\n"


def entry(name: str, thing: Any) -> Iterator[str]:
    """Heading, signature and description of one exported thing; of a class its public members, too."""
    yield f"\n### `{name}`\n"
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        yield f"```python\n{name} = {thing!r}\n```"
        return
    node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    yield f"```python\n{_signature(node)}\n```\n"
    yield prose(ast.get_docstring(node)) + "\n"
    if not isinstance(node, ast.ClassDef):
        return
    for member, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(member, ast.AnnAssign) and not ast.unparse(member.target).startswith("_"):
            yield f"- `{ast.unparse(member)}`{_below(after)}"
        if isinstance(member, ast.FunctionDef) and _is_public(member):
            yield f"\n#### `{name}.{member.name}`\n\n```python\n{_signature(member)}\n```\n"
            yield prose(ast.get_docstring(member))


def _is_public(member: ast.FunctionDef) -> bool:
    return not member.name.startswith("_") or (member.name == "__init__" and ast.get_docstring(member) is not None)


def _signature(node: ast.stmt) -> str:
    """Decorators and the line of `class` or `def`, as in the source, without its body."""
    assert isinstance(node, ast.ClassDef | ast.FunctionDef)
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": [ast.Expr(ast.Constant(...))]})
    return ast.unparse(ast.fix_missing_locations(bare)).removesuffix("...").rstrip().removesuffix(":")


def _below(statement: ast.stmt | None) -> str:
    """The string under a field."""
    said = statement.value if isinstance(statement, ast.Expr) else None
    return f": {' '.join(str(said.value).split())}" if isinstance(said, ast.Constant) else ""


def prose(docstring: str | None) -> str:
    """A docstring in Google's style as Markdown."""
    lines: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        if section := _SECTION.fullmatch(line):
            inside = True
            lines += [f"**{section[1]}**", ""]
        elif inside and (item := _ITEM.fullmatch(line.removeprefix("    "))):
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            inside = inside and (not line or line.startswith(" "))
            lines.append(line.strip() if inside and not line.startswith("        ") else line.removeprefix("      "))
    return "\n".join(lines)
