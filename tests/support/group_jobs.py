"""A teacher spread over the ranks of a group, asked by the leader."""

from typing import Any

import torch.distributed as dist

from storage_schemas.config import Estimator
from storage_schemas.provenance import Recipe
from storage_schemas.rows import Row
from storage_schemas.targets import Targets
from teacher_dump.config import TeacherSection
from teacher_dump.teachers import group as group_module
from teacher_dump.teachers import teacher as teacher_module
from teacher_dump.teachers.group import Group, GroupTeacher


def targets(
    rank: int, world_size: int, rendezvous: str, *, cases: list[dict[str, Any]], batches: list[list[Row]],
    estimator: Estimator,
) -> list[tuple[int, list[list[Targets | None]], list[int], bool]]:  # fmt: skip
    """Per case, a teacher section: elements of the weights that this rank holds, the leader's targets, the samples
    that went through the model here, and whether weights are gathered ahead of their use. The head sees 16 tokens at a
    time."""
    teacher_module._CHUNK_BYTES = dict.fromkeys(("cpu", "cuda"), 1)
    launched, original = list[int](), group_module.launch

    def launch(model: Any, samples: list[Row], *arguments: Any, **options: Any) -> Any:
        launched.extend(sample.sample_index for sample in samples)
        return original(model, samples, *arguments, **options)

    group_module.launch = launch
    group = Group.join(rank, world_size, rank, device=cases[0].get("device", "cpu"), rendezvous=rendezvous)
    found = []
    for case in cases:
        teacher = GroupTeacher(TeacherSection.model_validate({"dtype": "float32"} | case), group)
        answers = []
        if group.leads:
            recipe = Recipe(estimator=estimator, temperatures=(1.0, 2.0), logsumexp=True)
            answers = [teacher.targets(batch, recipe) for batch in batches]
            group.send(None)
        else:
            teacher.follow()
        spread = getattr(teacher.model, "zero_engine", None)
        ahead = bool(spread) and spread[0].optimizer.get_param_coordinator().is_complete_trace()
        found.append((_held(teacher.model), answers, launched.copy(), ahead))
        launched.clear()
    dist.destroy_process_group()
    return found


def _held(model: Any) -> int:
    """Elements of the weights in this process."""
    total = 0
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            total += parameter.ds_tensor.numel()
        else:
            total += getattr(parameter, "_local_tensor", parameter).numel()
    return total
