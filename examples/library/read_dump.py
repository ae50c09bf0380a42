"""Read a dump into torch: python read_dump.py URL."""

import sys

from storage_schemas import Dump, decode
from student_train import DumpDataset


def main(url: str) -> None:
    dump = Dump.open(url)
    print(f"{dump.provenance.corpus.samples} samples, sealed: {dump.is_sealed()}")

    # Samples as numpy arrays, shard by shard, in the order of the corpus.
    for row in dump.read_unit(0):
        if row.targets is not None:
            head = decode(row.targets)  # (tokens, K)
            print(f"{row.sample_id}: {len(row.targets)} targets, {head.weights.sum(1).mean():.3f} of the probability")

    # Batches of tensors, shuffled, from any step on: this rank's share of each step.
    rank, world_size = 0, 1
    data = DumpDataset(dump, seed=0)
    for batch in data.batches(4, rank=rank, world_size=world_size, start=1):
        targets = batch.targets
        print(
            f"input_ids {tuple(batch.input_ids.shape)}, {batch.supervised} targets with {targets.ids.shape[1]} entries"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
