"""Stage one from Python: a dump of a teacher that a configuration names, or of a model that is in memory."""

from typing import TYPE_CHECKING

from storage_schemas.common.public import lazily

if TYPE_CHECKING:
    from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
    from teacher_dump.dump import DumpSummary, run_dump
    from teacher_dump.recompute import RecomputeReport, recompute_rows
    from teacher_dump.teachers.loaded import LoadedTeacher

__all__ = [
    "CorpusSection", "DumpSummary", "LoadedTeacher", "RecomputeReport", "SourceSection", "TeacherSection",
    "recompute_rows", "run_dump",
]  # fmt: skip
__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("CorpusSection", "SourceSection", "TeacherSection"), "config"),
        **dict.fromkeys(("DumpSummary", "run_dump"), "dump"),
        **dict.fromkeys(("RecomputeReport", "recompute_rows"), "recompute"),
        "LoadedTeacher": "teachers.loaded",
    },
)
