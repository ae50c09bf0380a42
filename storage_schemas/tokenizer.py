"""Tokenizer identity: the id -> token map, not a name and not a size."""

from collections.abc import Mapping

from storage_schemas.canonical import digest
from storage_schemas.common.errors import MismatchError


def vocab_sha256(vocab: Mapping[str, int]) -> str:
    """Hash of a token -> id map, independent of its order."""
    return digest(sorted((index, token) for token, index in vocab.items()))


def refuse_other_tokenizer(
    dump_vocab: Mapping[str, int], student_vocab: Mapping[str, int], *, student_head: int
) -> None:
    """Raise MismatchError unless the two maps agree on every id that both can mean.

    Heads are often padded beyond the tokenizer (151,936 or 152,064 rows for 151,665 tokens), and one tokenizer may
    have a few tokens more at its end; neither changes what a stored id means, so neither is refused.

    Args:
        dump_vocab: token -> id of the tokenizer in the dump.
        student_vocab: token -> id of the student's tokenizer.
        student_head: rows of the student's LM head.
    """
    theirs = {index: token for token, index in dump_vocab.items()}
    ours = {index: token for token, index in student_vocab.items()}
    shared = min(max(theirs, default=-1), max(ours, default=-1)) + 1
    conflicts = [index for index in range(shared) if theirs.get(index) != ours.get(index)]
    if conflicts or not shared:
        shown = ", ".join(f"{i}: teacher {theirs.get(i)!r}, student {ours.get(i)!r}" for i in conflicts[:5])
        raise MismatchError(
            "the student's tokenizer is not the teacher's",
            got=f"{len(conflicts)} of {shared} shared ids mean another token ({shown})",
            expected="the same id -> token map over the ids that both know",
            fix="choose a student with the teacher's tokenizer: logits cannot be translated between vocabularies",
        )
    if student_head <= max(theirs):
        raise MismatchError(
            "the student's head is smaller than the dump's vocabulary",
            got=f"{student_head} rows",
            expected=f"at least {max(theirs) + 1}",
            fix="give it more rows with `llm-neo resize`, or choose another student",
        )


def new_tokens(dump_vocab: Mapping[str, int], known: int) -> list[str]:
    """Tokens of a dump whose ids lie behind the first `known` ones, in the order of their ids."""
    return [token for token, index in sorted(dump_vocab.items(), key=lambda pair: pair[1]) if index >= known]
