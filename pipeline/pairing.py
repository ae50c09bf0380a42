"""Whether the student's ids mean what the teacher's mean, asked before a dump is paid for.

Training asks the same of the dump's tokenizer (`student_train.model.tokenizers`); by then the teacher has run.
"""

import logging
import sys
from collections.abc import Mapping

from pipeline.config import Config
from storage_schemas.common.errors import first_line
from storage_schemas.records import RUN
from storage_schemas.stores.store import Store
from storage_schemas.tokenizer import refuse_other_tokenizer
from teacher_dump.config import TeacherSection

log = logging.getLogger(__name__)


def refuse_pair(config: Config) -> None:
    """Raise MismatchError if the ids of `student` do not mean those of `teacher`, and no dump has begun.

    A student whose tokenizer cannot be had here, as on a cluster that only dumps, is compared when training begins.
    """
    from student_train.model.tokenizers import student_vocabulary

    if config.teacher is None or config.student is None:
        return
    # Not its size: what a store says to HEAD does not tell a wrong clock from missing permissions.
    if Store(config.dump.url, options=config.dump.storage_options).get_if_present(RUN) is not None:
        return
    try:
        ours = student_vocabulary(config.student.model, config.student.revision)
    except Exception as error:  # Whatever a hub may say: a dump needs no student.
        log.info("the tokenizers of teacher and student are compared when training begins: %s", first_line(error))
        return
    refuse_unlike(teacher_vocabulary(config.teacher), ours)


def refuse_unlike(theirs: Mapping[str, int], ours: Mapping[str, int] | None) -> None:
    """Raise MismatchError unless the ids of a student's vocabulary, if it has one, mean the teacher's.

    Rows that its head may lack are no matter here: `llm-neo resize` gives them once there is a dump.
    """
    if ours is not None:
        refuse_other_tokenizer(theirs, ours, student_head=sys.maxsize)


def teacher_vocabulary(teacher: TeacherSection) -> dict[str, int]:
    """Ids by token; no weights are fetched. Raises MismatchError."""
    from teacher_dump.corpus.preview import load_tokenizer

    return dict(load_tokenizer(teacher)[0].get_vocab())
