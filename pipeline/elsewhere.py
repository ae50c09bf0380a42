"""What settings, values and commands of other trainers are called here: the names that people bring along.

From TRL, transformers and peft, axolotl, LLaMA-Factory, DistillKit and torchtune.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Here(NamedTuple):
    """Where a setting of another trainer is in ours."""

    places: tuple[str, ...]
    """Dotted names, without the numbers of list elements."""
    note: str = ""
    """What else there is to say."""

    def hint(self) -> str:
        """For an error message."""
        named = " or ".join(place.replace("sources.", "sources[].") for place in self.places)
        note = f" {self.note}" if self.note else ""
        return f"did you mean {named}?{note}" if named else self.note


RENAMED = {"train.arm": "train.method"}
"""Old name of a setting of ours -> new one. Both are read, and the new one is written."""

_PLACES = {
    # The optimisation.
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu",
    "train.epochs": "num_train_epochs num_epochs",
    "train.max_steps": "max_train_steps total_steps num_training_steps",
    "train.output": "output_dir save_path",
    "train.learning_rate": "lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler lr_schedule learning_rate_schedule",
    "train.warmup_ratio": "warmup",
    "train.warmup_steps": "num_warmup_steps",
    "train.precision": "bf16 fp16 mixed_precision",
    "train.max_grad_norm": "gradient_clipping clip_grad_norm max_norm",
    "train.adam_epsilon": "adam_eps",
    "train.gradient_checkpointing": "use_gradient_checkpointing enable_activation_checkpointing",
    "train.packing": "sample_packing pack_sequences",
    "train.save_steps": "save_every",
    "train.eval_steps": "run_val_every_n_steps",
    "train.early_stopping_patience": "early_stopping",
    "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "train.project": "wandb_project",
    "train.run_name": "wandb_name wandb_run_name",
    "train.report_to": "use_wandb use_tensorboard",
    "train.deepspeed": "deepspeed_config ds_config",
    "train.zero_stage": "zero zero_optimization",
    "train.neftune_noise_alpha": "neftune_alpha",
    "train.method": "finetuning_type training_type trainer train.type",
    # The models, and LoRA.
    "student.model": "base_model student_model student_model_name_or_path student_name student_path "
    "student.name student.path",
    "teacher.model": "teacher_model teacher_model_name_or_path teacher_name teacher_path teacher_model_path kd_teacher "
    "teacher.name teacher.path",
    "teacher.backend": "teacher.type teacher.kind teacher.engine",
    "teacher.batch_tokens": "teacher.batch_size dump.batch_size",
    "teacher.revision": "teacher_model_revision",
    "teacher.dtype": "teacher_dtype teacher_torch_dtype",
    "teacher": "teacher_model_init_kwargs",
    "teacher.sharding": "device_map",
    "student.lora.r": "rank lora_r lora_rank",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.target_modules": "lora_target_modules lora_target lora_target_linear lora_attn_modules target_linear",
    "student.lora.variant": "use_rslora use_dora peft_use_rslora peft_use_dora init_lora_weights lora.type",
    "student.lora.extra": "layers_to_transform rank_pattern alpha_pattern",
    "student.lora": "peft_config lora_config peft",
    "student.adapter": "lora_model_dir adapter_name_or_path",
    # The loss, and what it is computed from.
    "loss.divergence": "loss_type kd_loss kd_loss_type kl_type divergence_type loss_function loss_functions loss.type "
    "loss.kind loss.name",
    "loss.beta": "jsd_beta",
    "loss": "distillation kd kd_config",
    "estimator.k": "top_k topk kd_top_k kd_topk loss_top_k num_logprobs logprobs max_logprobs",
    "estimator.mass": "top_p nucleus coverage",
    "estimator.kind": "estimator.type estimator.name",
    "estimator.draws": "estimator.num_samples num_draws sampling_rounds",
    "estimator.tail_draws": "tail_samples num_tail_samples",
    # The dump.
    "dump.url": "logits_path logits_dir teacher_logits logits_cache_dir dataset_repo dump.path dump.output",
    "dump.samples_per_unit": "samples_per_shard shard_size rows_per_shard",
    "dump.logprob_step": "dump.quantization logprob_quantization quantization_step",
    "dump.max_kl": "max_quantization_kl",
    # The data.
    "corpus.sources": "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file",
    "corpus.sources.name": "dataset_config dataset_config_name subset",
    "corpus.sources.split": "dataset_split dataset_train_split train_split",
    "corpus.sources.format": "dataset_type formatting dataset_text_field chat_type "
    "sources.type corpus.type heldout.type",
    "corpus.sources.weight": "interleave_probs mix_ratio",
    "corpus.max_length": "max_seq_length max_seq_len sequence_len cutoff_len seq_len model_max_length",
    "corpus.mask": "train_on_inputs train_on_input train_on_prompt assistant_only_loss completion_only_loss",
    "corpus.num_proc": "dataset_num_proc preprocessing_num_workers dataset_processes",
    "corpus.cache_dir": "dataset_prepared_path data_cache_dir",
    "heldout.sources": "eval_dataset test_datasets validation_file eval_file test_file dataset_test_split",
}
_NOTED = [
    ("gradient_accumulation_steps", "train.global_batch_size",
     "It counts samples per optimizer step over all ranks; micro-batches are accumulated up to it"),
    ("batch_size train_batch_size", "train.global_batch_size train.micro_batch_size",
     "The first counts samples per optimizer step over all ranks, the second samples per forward pass and rank, at "
     "most"),
    ("max_steps_per_epoch", "train.max_steps", "It counts the steps of the whole run"),
    ("evals_per_epoch eval_strategy evaluation_strategy", "train.eval_steps",
     "It is the number of steps between two evaluations"),
    ("saves_per_epoch save_strategy", "train.save_steps", "It is the number of steps between two checkpoints"),
    ("max_shard_size", "dump.samples_per_unit", "It counts samples, not bytes"),
    ("val_set_size", "heldout.sources",
     "No share of the corpus is set aside: name other samples, such as `split: train[95%:]` beside `train[:95%]`"),
    ("kd_ce_alpha", "", "the weight of the cross-entropy is 1 - loss.alpha, and has no setting of its own"),
    ("teacher.quantization", "teacher.vllm teacher.dtype",
     "vLLM takes it in teacher.vllm; transformers computes in teacher.dtype"),
    ("heldout.path", "heldout.url heldout.sources.path", "The first is the dump, the second what it is of"),
    ("model_name_or_path model_name", "student.model teacher.model", ""),
    ("model_revision", "student.revision teacher.revision", ""),
    ("torch_dtype dtype", "teacher.dtype train.precision", ""),
    ("attn_impl flash_attention flash_attn use_flash_attention_2",
     "student.attn_implementation teacher.attn_implementation", ""),
    ("kd_temperature distill_temperature", "loss.temperature", "The dump must hold it: `temperatures`"),
    ("optim optimizer", "",
     "the optimizer is AdamW; its settings are train.adam_beta1, train.adam_beta2 and train.adam_epsilon"),
    ("max_samples max_train_samples corpus.num_samples heldout.num_samples sources.num_samples",
     "corpus.sources.split corpus.sources.weight", "`split: train[:1000]` takes the first"),
    ("kd_alpha kd_ratio kd_weight distill_alpha distillation_alpha kd_loss_weight kl_weight", "loss.alpha",
     "It is the weight of the divergence; the cross-entropy gets 1 - alpha"),
    ("tensor_parallel_size", "teacher.vllm teacher.sharding",
     "vLLM takes it in teacher.vllm; otherwise see teacher.sharding"),
    ("gpu_memory_utilization", "teacher.vllm", "It is an argument of vLLM's engine"),
    ("adapter", "train.method student.adapter", ""),
    ("lmbda seq_kd", "", "there is no such setting: training is off-policy, on the samples of the dump"),
]  # fmt: skip
"""(names elsewhere, places here, what else there is to say) of what has several places, or a note."""
SETTINGS = {name: Here((place,)) for place, names in _PLACES.items() for name in names.split()} | {
    name: Here(tuple(places.split()), note) for names, places, note in _NOTED for name in names.split()
}
"""Name of a setting elsewhere -> where it is here. `section.name` is it in that section alone, and goes first."""

_VALUES = {
    "loss.divergence": {
        "forward_kl": "kl kld kl_div kl_divergence forward_kld forward fkl",
        "reverse_kl": "rkl rkld reverse_kld reverse",
        "jsd": "js js_div jensen_shannon generalized_jsd",
        "skewed_kl": "skl sfkl skewed_fkl skew_kl skewed_forward_kl",
        "skewed_reverse_kl": "srkl skewed_rkl skew_rkl",
        "akl": "adaptive_kl",
        "tvd": "tv total_variation",
    },
}
VALUES = {place: {said: here for here, names in values.items() for said in names.split()}
          for place, values in _VALUES.items()}  # fmt: skip
"""Setting -> a value of it elsewhere -> what it is here."""

_COMMANDS = {
    "`llm-neo run`, or `llm-neo dump` and then `llm-neo train`": "distill",
    "`llm-neo train`": "finetune fit sft",
    "`llm-neo dump`": "teacher precompute logits",
    "`llm-neo evaluate`": "eval",
    "`llm-neo chat`": "generate inference",
    "`llm-neo freeze`": "preprocess",
    "`llm-neo config show` or `llm-neo doctor`": "validate check",
    "`llm-neo config show`, or `llm-neo inspect` of a dump": "show",
    "`llm-neo config schema`": "schema",
    "`llm-neo config diff`": "diff",
    "`llm-neo init`": "fetch cp new",
}
COMMANDS = {name: here for here, names in _COMMANDS.items() for name in names.split()}
"""Name of a command elsewhere -> what does it here."""


def setting(name: str, section: Sequence[str] = ()) -> str | None:
    """A hint at the setting that another trainer calls so.

    Args:
        section: where it stands, from the outermost section on.
    """
    parts = [part.lower().replace("-", "_") for part in (*section, name)]
    found = next((SETTINGS[key] for at in range(len(parts)) if (key := ".".join(parts[at:])) in SETTINGS), None)
    if found is None:
        return None
    # Held-out samples have sources and an estimator of their own.
    places = list(found.places)
    if parts[0] == "heldout":
        own = ("corpus.sources", "estimator.")
        places = [f"heldout.{p.removeprefix('corpus.')}" if p.startswith(own) else p for p in places]
    here = tuple(place for place in places if place.startswith(f"{'.'.join(parts[:-1])}."))
    return Here(here or tuple(places), found.note).hint()


def value(place: str, said: object) -> str | None:
    """A hint at the value of a setting that other trainers call so."""
    here = VALUES.get(place, {}).get(str(said).lower().replace("-", "_"))
    return f"did you mean {here}?" if here else None
