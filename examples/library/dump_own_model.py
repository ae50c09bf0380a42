"""Dump a model that is in memory: python dump_own_model.py MODEL CORPUS URL."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage_schemas import Dump, DumpSection, TopK
from teacher_dump import CorpusSection, LoadedTeacher, SourceSection, recompute_rows, run_dump


def main(source: str, corpus: str, url: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():  # Whatever was done to the weights: the dump is of those that run.
        model.get_output_embeddings().weight.mul_(1.1)

    teacher = LoadedTeacher(model.eval(), AutoTokenizer.from_pretrained(source), name="sharpened")
    summary = run_dump(
        dump=DumpSection(url=url, samples_per_unit=4),
        teacher=teacher,
        corpus=CorpusSection(sources=[SourceSection(path=corpus)], max_length=64),
        estimator=TopK(k=64),
    )
    print(f"{summary.rows} samples, {summary.supervised_tokens} supervised tokens in {summary.units} shards")

    report = recompute_rows(Dump.open(url), teacher, rows=4)
    print(f"KL(recomputed || stored) = {report.kl[0]:.1e} nats, {len(report.errors)} errors")


if __name__ == "__main__":
    main(*sys.argv[1:])
