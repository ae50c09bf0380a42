"""Whether the student's ids mean what the teacher's mean, asked before a dump is paid for.

Training asks the same of the dump's tokenizer (`student_train.model.tokenizers`); by then the teacher has run.
"""

import logging
from collections.abc import Mapping

from pipeline.config import Config
from storage_schemas.common.errors import NeoError
from storage_schemas.records import RUN
from storage_schemas.stores.store import Store
from student_train.config import StudentSection
from teacher_dump.config import TeacherSection

log = logging.getLogger(__name__)


def refuse_pair(config: Config) -> None:
    """Raise MismatchError if the ids of `student` do not mean those of `teacher`, and no dump has begun.

    A student that is not here, as on a cluster that only dumps, is compared when training begins.
    """
    from student_train.model.load import head_rows

    student = config.student
    if config.teacher is None or student is None:
        return
    if Store(config.dump.url, options=config.dump.storage_options).size(RUN) is not None:
        return
    try:
        head_rows(student.model, student.revision, trust=student.trust_remote_code)
    except NeoError as error:
        log.info("the tokenizers of teacher and student are compared when training begins: %s", error.what)
        return
    refuse_unlike(student, tokenizer_of(config.teacher))


def refuse_unlike(student: StudentSection, tokenizer: Mapping[str, bytes]) -> bool:
    """Raise MismatchError unless the student's ids mean what those of a tokenizer, given as its files, mean.

    Returns:
        Whether the student has a tokenizer; without one its ids are taken to mean the same.
    """
    from student_train.model.load import head_rows
    from student_train.model.tokenizers import has_tokenizer, refuse_tokenizer

    model, revision = student.model, student.revision
    rows = head_rows(model, revision, trust=student.trust_remote_code)
    refuse_tokenizer(model, revision, tokenizer, head_rows=rows)
    return has_tokenizer(model, revision)


def tokenizer_of(teacher: TeacherSection) -> dict[str, bytes]:
    """The files that a dump would keep of the teacher's tokenizer; no weights are fetched. Raises MismatchError."""
    from teacher_dump.corpus.preview import load_tokenizer
    from teacher_dump.dump import tokenizer_files

    return tokenizer_files(load_tokenizer(teacher)[0])
