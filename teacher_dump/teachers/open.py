"""Which class runs the teacher that a configuration names."""

from contextlib import AbstractContextManager, closing, nullcontext

from storage_schemas.common.errors import UsageError
from teacher_dump.config import TeacherSection
from teacher_dump.teachers.teacher import Teacher


def opened(teacher: Teacher | TeacherSection) -> AbstractContextManager[Teacher]:
    """The teacher of a section, closed at the end; one that is given stays open."""
    return nullcontext(teacher) if isinstance(teacher, Teacher) else closing(open_teacher(teacher))


def under_transformers(section: TeacherSection) -> TeacherSection:
    """The same teacher for transformers, which spreads over all devices, host and disk what vLLM may have spread."""
    return section.model_copy(update={"backend": "transformers", "vllm": {}, "sharding": "device_map"})


def open_teacher(section: TeacherSection) -> Teacher:
    """The teacher of a section in this one process; its weights are loaded later.

    Raises:
        UsageError: it is spread over several processes, see `teacher_dump.teachers.group`.
    """
    if section.grouped:
        raise UsageError(
            f"teacher.sharding: {section.sharding} spreads the teacher over several processes",
            got="one process",
            expected="llm-neo dump or plan CONFIG --nproc N",
            fix="start it so, or set teacher.sharding to none or device_map",
        )
    if section.backend == "vllm":
        from teacher_dump.teachers.vllm import VllmTeacher

        return VllmTeacher(section)
    return Teacher(section)
