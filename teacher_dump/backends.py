"""Which class runs the teacher that a configuration names."""

from teacher_dump.config import TeacherSection
from teacher_dump.teacher import Teacher


def open_teacher(section: TeacherSection) -> Teacher:
    """The teacher of a section; its weights are loaded later."""
    if section.backend == "vllm":
        from teacher_dump.vllm_backend import VllmTeacher

        return VllmTeacher(section)
    return Teacher(section)
