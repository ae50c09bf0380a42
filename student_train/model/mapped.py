"""At ZeRO-3 the weights stay in the mapped file until every rank has taken its share of them, one after the other.

transformers maps a safetensors file, and copies a weight only to cast it. Read in the dtype of the file, they take no
memory of a rank's own: the pages are the same for all ranks of a node, and can be dropped. `engine` casts each weight
as it spreads it.
"""

import torch
from transformers import PreTrainedModel

from student_train.config import StudentSection, TrainSection


def reads_mapped(student: StudentSection, train: TrainSection) -> bool:
    """Whether the student is read in the dtype of its files, where that changes no bit of what is trained: peft rounds
    an adapter's start to the dtype of its base, so in fp32 it does; PiSSA rounds what it leaves of the base weights."""
    decomposed = train.lora and student.lora.variant == "pissa"
    return train.zero_stage == 3 and train.precision == "bf16" and not decomposed


def in_usable_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model that was read in the dtype of its files; as `dtype` where that is float16, whose range is too small."""
    return base.to(dtype) if base.dtype == torch.float16 else base
