"""The fused loss in a loop of your own: python own_loop.py MODEL URL."""

import sys
from itertools import islice

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from storage_schemas import Dump
from student_train import DumpDataset, HeadSpec, LossSection, fused_head_loss

ACCUMULATED = 2


def main(source: str, url: str, epochs: int = 3) -> list[float]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    student = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-3)

    loss, weight = LossSection(alpha=0.5, divergence="forward_kl"), base.get_output_embeddings().weight
    head = HeadSpec.of(base.config)
    data, losses = DumpDataset(Dump.open(url)), []
    batches = data.batches(2, stop=epochs * data.steps_per_epoch(2), vocab_size=len(weight))
    while step := list(islice(batches, ACCUMULATED)):
        # Losses are sums: divide once, by the supervised tokens of the whole step (over all ranks, if there are more).
        tokens, total = sum(batch.supervised for batch in step), 0.0
        for batch in step:
            body = base.get_decoder()
            states = body(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
            sums = fused_head_loss(batch.select(states), weight, batch.targets, loss=loss, head=head)
            (sums.loss / max(1, tokens)).backward()
            total += float(sums.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / max(1, tokens))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per supervised token after {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
