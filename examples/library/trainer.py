"""A dump in transformers' Trainer: python trainer.py MODEL URL OUTPUT."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from storage_schemas import Dump
from student_train import DumpDataset, DumpTrainer, LossSection


def main(source: str, url: str, output: str) -> float:
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    student = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trainer = DumpTrainer(
        student,
        TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=5e-3,
            logging_steps=1,
            report_to="none",
        ),
        DumpDataset(Dump.open(url)),
        loss=LossSection(alpha=0.5, divergence="forward_kl"),
        processing_class=AutoTokenizer.from_pretrained(source),
    )
    result = trainer.train()
    trainer.save_model()
    print(f"loss {result.training_loss:.3f} nats per supervised token on average")
    return float(result.training_loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
