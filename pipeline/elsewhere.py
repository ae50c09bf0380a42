"""What settings and commands of other trainers are called here: the names that people bring along.

From TRL, transformers and peft, axolotl, LLaMA-Factory, DistillKit and torchtune.
"""

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


_ALL_RANKS = "It counts samples per optimizer step over all ranks; micro-batches are accumulated up to it"
_DEVICES = "vLLM takes it in teacher.vllm; otherwise see teacher.sharding"
_ADAMW = "the optimizer is AdamW; its settings are train.adam_beta1, train.adam_beta2 and train.adam_epsilon"
_OFF_POLICY = "there is no such setting: training is off-policy, on the samples of the dump"

_PLACES = {
    # The optimisation.
    "train.micro_batch_size": "per_device_train_batch_size train_batch_size train_micro_batch_size_per_gpu batch_size",
    "train.epochs": "num_train_epochs num_epochs",
    "train.max_steps": "max_train_steps total_steps num_training_steps max_steps_per_epoch",
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
    "train.save_steps": "saves_per_epoch save_strategy save_every",
    "train.eval_steps": "eval_strategy evaluation_strategy evals_per_epoch run_val_every_n_steps",
    "train.early_stopping_patience": "early_stopping",
    "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "train.project": "wandb_project",
    "train.run_name": "wandb_name wandb_run_name",
    "train.report_to": "use_wandb use_tensorboard",
    "train.deepspeed": "deepspeed_config ds_config",
    "train.zero_stage": "zero zero_optimization",
    "train.neftune_noise_alpha": "neftune_alpha",
    "train.method": "finetuning_type training_type trainer",
    # The models, and LoRA.
    "student.model": "base_model student_model student_model_name_or_path student_name student_path",
    "teacher.model": "teacher_model teacher_model_name_or_path teacher_name teacher_path teacher_model_path kd_teacher",
    "teacher.revision": "teacher_model_revision",
    "teacher.dtype": "teacher_dtype teacher_torch_dtype",
    "teacher": "teacher_model_init_kwargs",
    "teacher.sharding": "device_map",
    "student.lora.r": "rank lora_r lora_rank",
    "student.lora.alpha": "lora_alpha",
    "student.lora.dropout": "lora_dropout",
    "student.lora.target_modules": "lora_target_modules lora_target lora_target_linear lora_attn_modules target_linear",
    "student.lora.variant": "use_rslora use_dora peft_use_rslora peft_use_dora init_lora_weights",
    "student.lora.extra": "modules_to_save lora_modules_to_save layers_to_transform rank_pattern alpha_pattern",
    "student.lora": "peft_config lora_config peft",
    "student.adapter": "lora_model_dir adapter_name_or_path",
    # The loss, and what it is computed from.
    "loss.alpha": "kd_alpha kd_ratio kd_weight distill_alpha distillation_alpha kd_loss_weight kl_weight kd_ce_alpha",
    "loss.divergence": "loss_type kd_loss kd_loss_type kl_type divergence_type loss_function loss_functions",
    "loss.beta": "jsd_beta",
    "loss": "distillation kd kd_config",
    "estimator.k": "top_k topk kd_top_k kd_topk loss_top_k num_logprobs logprobs max_logprobs",
    "estimator.mass": "top_p nucleus coverage",
    "estimator.draws": "num_samples num_draws sampling_rounds",
    "estimator.tail_draws": "tail_samples num_tail_samples",
    # The dump.
    "dump.url": "logits_path logits_dir teacher_logits logits_cache_dir dataset_repo",
    "dump.samples_per_unit": "samples_per_shard shard_size rows_per_shard max_shard_size",
    "dump.logprob_step": "quantization logprob_quantization quantization_step",
    "dump.max_kl": "max_quantization_kl",
    # The data.
    "corpus.sources": "dataset datasets dataset_name dataset_path dataset_dir data_path data_files train_file",
    "corpus.sources.name": "dataset_config dataset_config_name subset",
    "corpus.sources.split": "dataset_split dataset_train_split train_split",
    "corpus.sources.format": "type dataset_type formatting dataset_text_field chat_type",
    "corpus.sources.weight": "interleave_probs mix_ratio",
    "corpus.max_length": "max_seq_length max_seq_len sequence_len cutoff_len seq_len model_max_length",
    "corpus.mask": "train_on_inputs train_on_input train_on_prompt assistant_only_loss completion_only_loss",
    "corpus.num_proc": "dataset_num_proc preprocessing_num_workers dataset_processes",
    "corpus.cache_dir": "dataset_prepared_path data_cache_dir",
    "heldout.sources": "eval_dataset test_datasets validation_file eval_file test_file val_set_size dataset_test_split",
}
SETTINGS: dict[str, Here] = {name: Here((place,)) for place, names in _PLACES.items() for name in names.split()} | {
    "gradient_accumulation_steps": Here(("train.global_batch_size",), _ALL_RANKS),
    "model_name_or_path": Here(("student.model", "teacher.model")),
    "model_name": Here(("student.model", "teacher.model")),
    "model_revision": Here(("student.revision", "teacher.revision")),
    "torch_dtype": Here(("teacher.dtype", "train.precision")),
    "dtype": Here(("teacher.dtype", "train.precision")),
    "attn_impl": Here(("student.attn_implementation", "teacher.attn_implementation")),
    "flash_attention": Here(("student.attn_implementation", "teacher.attn_implementation")),
    "flash_attn": Here(("student.attn_implementation", "teacher.attn_implementation")),
    "use_flash_attention_2": Here(("student.attn_implementation", "teacher.attn_implementation")),
    "kd_temperature": Here(("loss.temperature",), "The dump must hold it: `temperatures`"),
    "distill_temperature": Here(("loss.temperature",), "The dump must hold it: `temperatures`"),
    "optim": Here((), _ADAMW),
    "optimizer": Here((), _ADAMW),
    "max_samples": Here(("corpus.sources.split", "corpus.sources.weight"), "`split: train[:1000]` takes the first"),
    "tensor_parallel_size": Here(("teacher.vllm", "teacher.sharding"), _DEVICES),
    "gpu_memory_utilization": Here(("teacher.vllm",), "It is an argument of vLLM's engine"),
    "adapter": Here(("train.method", "student.adapter")),
    "lmbda": Here((), _OFF_POLICY),
    "seq_kd": Here((), _OFF_POLICY),
}  # fmt: skip
"""Name of a setting elsewhere -> where it is here."""

COMMANDS = {
    "distill": "run, or dump and train one after the other",
    "finetune": "train",
    "fit": "train",
    "sft": "train",
    "teacher": "dump",
    "precompute": "dump",
    "logits": "dump",
    "eval": "evaluate",
    "export": "merge",
    "generate": "chat",
    "inference": "chat",
    "preprocess": "preview",
    "validate": "config show, or doctor",
    "fetch": "init",
    "cp": "init",
    "new": "init",
}
"""Name of a command elsewhere -> what does it here."""


def setting(name: str) -> str | None:
    """A hint at the setting that another trainer calls so."""
    found = SETTINGS.get(name.lower().replace("-", "_"))
    return found.hint() if found else None
