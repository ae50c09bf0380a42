"""The chat template of a corpus: the tokenizer's own or the configured one, with the configured arguments in it."""

import copy
from typing import Any

from jinja2 import TemplateError, meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from storage_schemas.common.errors import MismatchError
from teacher_dump.config import CorpusSection


def templated(tokenizer: Any, section: CorpusSection) -> Any:
    """The tokenizer with the chat template that the corpus is rendered with; itself where nothing is configured.

    `template_kwargs` become defaults that are written at the head of the template. So whoever renders with it, masks,
    training's `final/`, `llm-neo chat` or a server, has the same ones without knowing of them, and a record's own
    `chat_template_kwargs` come before them.

    Raises:
        MismatchError: there is no such file, the template is not Jinja, or it does not read an argument.
    """
    if section.chat_template is None and not section.template_kwargs:
        return tokenizer
    template = tokenizer.chat_template if section.chat_template is None else _text(section)
    if template is None:
        raise MismatchError(
            "corpus.template_kwargs needs a chat template, and the teacher's tokenizer has none",
            got="a base model's tokenizer",
            expected="a template that reads them",
            fix="set corpus.chat_template, or remove corpus.template_kwargs",
        )
    # Some tokenizers have several by name, such as `tool_use` for records with tools.
    several = template if isinstance(template, dict) else {"": template}
    read = set[str]().union(*map(_read_by, several.values()))
    if unread := section.template_kwargs.keys() - read:
        raise MismatchError(
            "the chat template does not read an argument that is configured",
            got=", ".join(sorted(unread)),
            expected=f"what it reads: {', '.join(sorted(read))}",
            fix="correct corpus.template_kwargs, or set a corpus.chat_template that reads them",
        )
    heads = (
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in section.template_kwargs.items()
    )
    # Templates are read with trim_blocks: the line end behind a block is none.
    head = f"{''.join(heads)}\n" if section.template_kwargs else ""
    changed = {name: head + each for name, each in several.items()}
    found = copy.copy(tokenizer)
    found.chat_template = changed if isinstance(template, dict) else changed[""]
    return found


def _text(section: CorpusSection) -> str:
    file = section.template_file
    try:
        return str(section.chat_template) if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MismatchError(
            "the chat template of the corpus cannot be read",
            got=f"{file}: {error.strerror if isinstance(error, OSError) else error}",
            expected="a Jinja file, or the template itself, which has {{ or {% in it",
            fix="correct corpus.chat_template",
        ) from error


def _read_by(template: str) -> set[str]:
    """Names of what a template is given."""
    try:
        return meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))
    except TemplateError as error:
        raise MismatchError(
            "the chat template of the corpus is not valid Jinja",
            got=f"{error} (line {getattr(error, 'lineno', '?')})",
            expected="a chat template that transformers reads",
            fix="correct corpus.chat_template",
        ) from error
