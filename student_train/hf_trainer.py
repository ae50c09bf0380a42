"""The loss on a dump's targets inside transformers' Trainer, for those who have one already."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from storage_schemas.canonical import differences
from storage_schemas.common.errors import MismatchError
from storage_schemas.logits import body_of
from storage_schemas.provenance import refuse_differences
from storage_schemas.tokenizer import refuse_other_tokenizer
from student_train.config import LossSection
from student_train.data.batch import TrainBatch
from student_train.data.dataset import DumpCollator, DumpDataset
from student_train.model.losses import refuse_biased
from student_train.model.router import RouterLoss
from student_train.model.student import causal_of, distilled, refuse_long_rows, vocab_rows
from student_train.model.tokenizers import vocabulary


class DumpTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, whose loss is that of LLM-Neo on a dump.

    The sum over the supervised tokens of a step is divided once, by their number over all micro-batches and ranks:
    neither gradient accumulation nor the number of ranks changes the gradient. Logits exist for chunks of supervised
    tokens only. For exact resume on another number of ranks, ZeRO-3, several dumps and following use `llm-neo train`.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        train_dataset: DumpDataset,
        *,
        loss: LossSection | None = None,
        eval_dataset: DumpDataset | None = None,
        chunk_tokens: int | None = None,
        **trainer: Any,
    ) -> None:
        """Prepare to train; the first argument that does not fit is refused.

        Args:
            model: a causal language model of transformers, or a PeftModel around one.
            args: transformers' `TrainingArguments`.
            train_dataset: read in its own order, an epoch at a time.
            loss: weight, divergence and temperature. None: the defaults, as in LLM-Neo.
            eval_dataset: another dump of the same tokenizer; the same loss is evaluated on it.
            chunk_tokens: supervised tokens per pass of the head. None: as many as have 256 MiB of logits.
            trainer: more of Trainer's arguments. A `processing_class` is compared with the dump's tokenizer.

        Raises:
            MismatchError: model, dumps, loss and arguments do not fit together.
        """
        loss = loss or LossSection()
        _refuse_unfit(model, args, loss, trainer)
        _refuse_dumps(train_dataset, eval_dataset, loss)
        run, rows = train_dataset.dump.provenance, vocab_rows(model)
        refuse_long_rows(model, run.corpus.max_length)
        if (tokenizer := trainer.get("processing_class")) is not None:
            theirs = vocabulary(train_dataset.dump.read_tokenizer())
            refuse_other_tokenizer(theirs, tokenizer.get_vocab(), student_head=rows)
        # In a list, since it holds the very model that Trainer saves.
        self._losses = [distilled(model, [loss], run, chunk_tokens=chunk_tokens)]
        causal = causal_of(model)
        self._body = body_of(causal, role="student")
        few = "logits_to_keep" in inspect.signature(causal.forward).parameters
        self._no_logits = {"logits_to_keep": 1} if few else {}
        collator = DumpCollator(train_dataset.dump, temperature=loss.temperature, vocab_size=rows)
        super().__init__(
            model, args, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset, **trainer
        )
        # Up to transformers 5.4 at least, accelerate divides by them too.
        self.accelerator.gradient_accumulation_steps = 1
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        self.model_accepts_loss_kwargs = True  # Else Trainer does not count the labels of a step.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss sum of a micro-batch over the supervised tokens of the whole step.

        `model` is called as a whole, so that what wraps it, such as DDP, sees its forward pass; the loss begins at the
        hidden states of its body.
        """
        batch: TrainBatch = inputs["batch"].to(self.args.device)
        states: list[Tensor] = []
        hook = self._body.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state))
        try:
            model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **self._no_logits)
        finally:
            hook.remove()
        loss, _ = self._losses[0].head(batch.select(states[-1]), batch)
        if not model.training:
            self._evaluated += torch.tensor([float(loss.detach()), batch.supervised], dtype=torch.float64)
        if num_items_in_batch is None:
            num_items_in_batch, ranks = batch.supervised, 1
        else:
            ranks = self.args.world_size  # What is summed over ranks is averaged then.
        loss = loss * ranks / torch.as_tensor(num_items_in_batch).clamp(min=1).to(loss.device)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *batches: Any, metric_key_prefix: str = "eval", **more: Any) -> Any:
        """As Trainer's, with the loss per supervised token of all batches, where Trainer takes the mean of theirs.

        On several ranks, samples that fill up the last batches count twice.
        """
        self._evaluated.zero_()
        found = super().evaluation_loop(*batches, metric_key_prefix=metric_key_prefix, **more)
        sums = self.accelerator.reduce(self._evaluated.to(self.args.device), "sum").tolist()
        if f"{metric_key_prefix}_loss" in found.metrics:
            found.metrics[f"{metric_key_prefix}_loss"] = sums[0] / max(1.0, sums[1])
        return found

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The dataset has an order of its own, by shards."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


def _refuse_unfit(model: nn.Module, args: Any, loss: LossSection, trainer: Mapping[str, Any]) -> None:
    """Raise MismatchError for what would be trained otherwise than asked for."""
    weight = causal_of(model).get_output_embeddings().weight
    several = args.world_size > 1
    unfit = {
        "an LM head that is spread over ranks (ZeRO-3, FSDP, tensor parallelism)": is_deepspeed_zero3_enabled()
        or bool(args.fsdp)
        or type(weight.data) is not Tensor,
        "several GPUs in one process (DataParallel); start one process per GPU with torchrun": args.n_gpu > 1,
        "average_tokens_across_devices=False on several ranks": several and not args.average_tokens_across_devices,
        "label_smoothing_factor": args.label_smoothing_factor,
        "torch_compile": args.torch_compile,
        "a train_sampling_strategy, where the dump has an order": getattr(args, "train_sampling_strategy", "random")
        not in ("random", "sequential"),
        "dataloader_persistent_workers, which would read each epoch in the order of the first": bool(
            args.dataloader_num_workers and args.dataloader_persistent_workers
        ),
        "the auxiliary loss of routers (output_router_logits)": RouterLoss.of(causal_of(model)) is not None,
        **{name: trainer.get(name) is not None for name in ("compute_loss_func", "compute_metrics", "data_collator")},
    }
    if got := [name for name, there in unfit.items() if there]:
        raise MismatchError(
            "DumpTrainer does not take part of what it is given",
            got="; ".join(got),
            expected="whole weights on each rank, and this loss alone",
            fix="leave it out, or train with `llm-neo train`",
        )


def _refuse_dumps(train: DumpDataset, evaluated: DumpDataset | None, loss: LossSection) -> None:
    """Raise MismatchError unless the dumps serve this loss, and mean the same by their ids and tails."""
    for dataset in (train, *([evaluated] if evaluated is not None else [])):
        if dataset.dump.provenance.estimator.draws and loss.alpha:
            refuse_biased(loss.divergence)
    if evaluated is None:
        return
    here, there = (
        {"tokenizer": run.tokenizer.model_dump(), "temperature_index": run.temperature_index(loss.temperature)}
        for run in (train.dump.provenance, evaluated.dump.provenance)
    )
    refuse_differences(
        "the dump that is evaluated on does not fit the one that is trained on",
        differences(here, there),
        fix="dump the held-out samples with the same teacher and temperatures",
    )
