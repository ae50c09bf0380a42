"""Stage two in a loop of your own, or in transformers' Trainer: batches of a dump, and the losses on them."""

from typing import TYPE_CHECKING

from storage_schemas.common.public import lazily

if TYPE_CHECKING:
    from student_train.config import LossSection
    from student_train.data.batch import SparseTargets, TrainBatch
    from student_train.data.dataset import DumpCollator, DumpDataset
    from student_train.hf_trainer import DumpTrainer
    from student_train.model.head import HeadLoss, HeadSpec, fused_head_loss
    from student_train.model.token_losses import TokenLosses, token_losses

__all__ = [
    "DumpCollator", "DumpDataset", "DumpTrainer", "HeadLoss", "HeadSpec", "LossSection", "SparseTargets", "TokenLosses",
    "TrainBatch", "fused_head_loss", "token_losses",
]  # fmt: skip
__getattr__ = lazily(
    __name__,
    {
        "LossSection": "config",
        **dict.fromkeys(("SparseTargets", "TrainBatch"), "data.batch"),
        **dict.fromkeys(("DumpCollator", "DumpDataset"), "data.dataset"),
        "DumpTrainer": "hf_trainer",
        **dict.fromkeys(("HeadLoss", "HeadSpec", "fused_head_loss"), "model.head"),
        **dict.fromkeys(("TokenLosses", "token_losses"), "model.token_losses"),
    },
)
