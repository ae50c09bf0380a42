"""Two clusters that never meet: first the dump and then the training, against both at once.

`make bench-clusters`; needs root, `slurm-wlm`, `munge`, `iproute2` and `gcc`. Each cluster has one core, so that
neither stage takes from the other what two real clusters would not share. Writes `benchmarks/clusters.md`.
"""

import argparse
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from support.cluster_jobs import CONFIG, DUMP, SMALL, TRAIN, environment, events, prepare  # noqa: E402
from support.s3_servers import IDENTITIES, READER, WRITER  # noqa: E402
from support.slurm import Cluster, missing, two_clusters, until  # noqa: E402

TRAINING = {"global_batch_size": 8, "micro_batch_size": 4, "epochs": 1, "save_steps": 1000}
TRAINING |= {"shuffle_window_units": 2, "shuffle_block_units": 2}


def completed(cluster: Cluster, job: int) -> None:
    """Wait for a job, and insist that it has done its work."""
    assert {found["JobState"] for found in cluster.ended(job, seconds=550)} == {"COMPLETED"}, cluster.logs()


def seconds(*, samples: int, overlapping: bool) -> dict[str, float]:
    """Seconds from the first submission to the end of the dump, the first step, and the end of the training."""
    one = {"teacher": 1, "student": 1}
    with two_clusters(IDENTITIES, nodes=one, gpus=one, pinned=True) as (teacher, student, _, _):
        sizes = {"hidden_size": 512, "layers": 8, "student_layers": 3}
        prepare(teacher, student, samples=samples, samples_per_unit=10, train=TRAINING, **sizes)
        began = time.monotonic()

        def train() -> int:
            options = [*SMALL, "--nodes=1", "--gpus-per-node=1"]
            return student.submit(TRAIN, CONFIG, options=options, env=environment(READER))

        training = train() if overlapping else None
        dump = teacher.submit(DUMP, CONFIG, options=[*SMALL, "--array=0"], env=environment(WRITER))
        found: dict[str, float] = {}

        def look() -> bool:
            if "dump" not in found and teacher.states(dump) == ["COMPLETED"]:
                found["dump"] = time.monotonic() - began
            if "first" not in found and events(student):
                found["first"] = time.monotonic() - began
            return len(found) == 2

        if training is None:
            completed(teacher, dump)
            found["dump"] = time.monotonic() - began
            training = train()
        until(look, lambda: teacher.logs() + student.logs(), seconds=550)
        completed(student, training)
        found["end"] = time.monotonic() - began
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1600)
    arguments = parser.parse_args()
    if (why := missing()) is not None:
        raise SystemExit(why)
    apart = seconds(samples=arguments.samples, overlapping=False)
    together = seconds(samples=arguments.samples, overlapping=True)
    rows = [
        ("end of the dump", "dump"),
        ("first optimizer step", "first"),
        ("end of the training", "end"),
    ]
    table = "\n".join(f"| {name} | {apart[key]:.0f} | {together[key]:.0f} |" for name, key in rows)
    text = f"""# Training that follows the dump, on two clusters

`make bench-clusters ARGS="--samples {arguments.samples}"`, that is, `python benchmarks/clusters.py` with these.

- work: a random Llama teacher of 8 layers and a student of 3, hidden size 512, {arguments.samples} conversations of
  about 75 tokens in units of 10, windows of 2 units, one epoch in steps of 8; the files of `examples/slurm`
- machine: {platform.machine()}, {os.cpu_count()} cores; two Slurm clusters in networks of their own with one core each,
  SeaweedFS in a third network
- versions: Python {platform.python_version()}, torch {version("torch")}, deepspeed {version("deepspeed")}

Seconds from the first submission; queueing, starting and loading included. "Together" submits the training first.

| | dump, then training | together |
|---|---:|---:|
{table}

Together takes {together["end"] / apart["end"]:.2f} of the time. What remains after the dump is the last window, the end
of the run and, where training is slower than the dump, what it is behind.
"""
    (HERE / "clusters.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
