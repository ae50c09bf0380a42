"""Small corpora, frozen with a tiny tokenizer, and what tests ask of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.tiny_teachers import CHATML, VOCABULARY, tiny_tokenizer

from storage_schemas.rows import Row
from teacher_dump.config import CorpusSection, SourceSection
from teacher_dump.corpus.formats import Conversation, Message
from teacher_dump.corpus.freeze import Corpus, freeze_corpus
from teacher_dump.corpus.masks import Tokens, Unusable, tokenise_conversations


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_questions(path: Path, samples: range) -> Path:
    """A conversation about each number."""
    turns = (
        [
            {"role": "user", "content": f"what is the answer to question {i}"},
            {"role": "assistant", "content": f"the answer is {i * 7} and how is the other one {i}"},
        ]
        for i in samples
    )
    return write_jsonl(path, ({"messages": messages} for messages in turns))


def freeze(
    *sources: Path | SourceSection, tokenizer: Any = None, lm_head_rows: int = VOCABULARY, **options: Any
) -> Corpus:
    """The corpus of some sources; options are those of the section `corpus`, or of every source that is a path."""
    common = {name: options.pop(name) for name in SourceSection.model_fields if name in options}
    each = [
        source if isinstance(source, SourceSection) else SourceSection(path=str(source), **common) for source in sources
    ]
    section = CorpusSection(sources=each, **options)
    return freeze_corpus(section, tokenizer or tiny_tokenizer(CHATML), lm_head_rows=lm_head_rows)


def ids_of(corpus: Corpus) -> list[str]:
    return [corpus.sample(i).sample_id for i in range(len(corpus))]


def statuses_of(corpus: Corpus) -> list[str]:
    return [corpus.sample(i).status for i in range(len(corpus))]


def tokenise_chats(tokenizer: Any, chats: Iterable[list[Message]], *, mask: str) -> list[Tokens | Unusable]:
    """Conversations of messages and nothing else."""
    return tokenise_conversations(tokenizer, [Conversation(messages) for messages in chats], mask=mask)


def supervised_text(tokenizer: Any, sample: Tokens | Unusable | Row) -> str:
    assert not isinstance(sample, Unusable)
    return str(tokenizer.decode(sample.input_ids[sample.loss_mask]))
