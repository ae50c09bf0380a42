"""A distillation on two clusters: what lies on each before the first job, and what jobs are started with."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import yaml
from support.s3_proxy import Proxy, Request
from support.s3_servers import BUCKET
from support.slurm import PROXY_PORT, ROOT, S3_PORT, STORE, Cluster
from support.tiny_teachers import save_teacher

from storage_schemas.reader import Dump
from storage_schemas.records import unit_of_record
from storage_schemas.stores.requests import object_store
from student_train.data.mix import Mix
from student_train.data.order import Order

DUMP, TRAIN = ROOT / "examples/slurm/dump.sbatch", ROOT / "examples/slurm/train.sbatch"
SMALL = ("--mem=500", "--cpus-per-task=1")
"""What every job of ours asks for, instead of what a real one does."""
CONFIG = "config.yaml"
URL = f"s3://{BUCKET}/run"
_WORDS = ("what", "is", "the", "answer", "to", "question", "and", "how", "other", "one")


def write_corpus(path: Path, samples: int, *, words: int) -> None:
    """So many conversations of random words."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(samples):
        said = [" ".join(rng.choice(_WORDS, words)) for _ in range(2)]
        turns = [{"role": "user", "content": f"{number} {said[0]}"}, {"role": "assistant", "content": said[1]}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))


def prepare(
    teacher: Cluster,
    student: Cluster,
    *,
    samples: int,
    samples_per_unit: int,
    hidden_size: int = 256,
    layers: int = 4,
    student_layers: int = 2,
    train: Mapping[str, Any],
) -> None:
    """Put the teacher and the corpus on one cluster, the student on the other, and the configuration on both."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "head_dim": hidden_size // 4}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.05}
    save_teacher(teacher.home / "models/teacher", num_hidden_layers=layers, **sizes)
    save_teacher(student.home / "models/student", num_hidden_layers=student_layers, seed=1, **sizes)
    write_corpus(teacher.home / "corpus.jsonl", samples, words=24)
    config = {
        "dump": {"url": URL, "samples_per_unit": samples_per_unit},
        # GPUs are pretended.
        "teacher": {"model": "models/teacher", "dtype": "float32", "batch_tokens": 256, "device": "cpu"},
        "estimator": {"kind": "topk", "k": 8},
        "corpus": {"sources": [{"path": "corpus.jsonl", "format": "messages"}], "max_length": 256},
        "student": {"model": "models/student", "lora": {"r": 4}},
        "train": {"output": "runs/a", "precision": "fp32", "zero_stage": 2, **train},
    }
    for cluster in (teacher, student):
        (cluster.home / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))


def environment(keys: Mapping[str, str], **more: str) -> dict[str, str]:
    """Variables of a job: the store and its keys, this code, one thread."""
    found = {
        "VENV": str(Path(sys.executable).parent.parent),
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL": f"http://store:{S3_PORT}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": keys["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": keys["secret_access_key"],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return found | more


PROXIED = {"AWS_ENDPOINT_URL": f"http://store:{PROXY_PORT}"}
"""Variables of a job that reaches the store through its proxy."""


def unit_committed_by(request: Request) -> int | None:
    """The unit of the dump at `URL` that a request would commit."""
    folder, _, record = request.key.partition("/run/")
    return unit_of_record(record) if (request.method, folder) == ("PUT", BUCKET) else None


def hold_dump(proxy: Proxy, *, units: int) -> None:
    """Let nobody who asks the proxy commit others than the first units of the dump at `URL`: the store is busy."""

    def error(request: Request) -> str | None:
        unit = unit_committed_by(request)
        return None if unit is None or unit < units else "SlowDown"

    proxy.error = error


def events(cluster: Cluster, run: str = "runs/a") -> list[dict[str, Any]]:
    """The lines of a run's events.jsonl."""
    path = cluster.home / run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # It is being written.
            break
    return found


def reached(cluster: Cluster, keys: Mapping[str, str]) -> dict[str, str]:
    """Variables of a command on the login node, where the store has no name."""
    return environment(keys, AWS_ENDPOINT_URL=f"http://{cluster.network.address(cluster.name, STORE)}:{S3_PORT}")


def supervised_per_step(cluster: Cluster, keys: Mapping[str, str], train: Mapping[str, Any]) -> list[int]:
    """Supervised tokens that each step of a training owes, if each sample has its one place in each epoch."""
    return _asked(cluster, keys, "supervised", URL, json.dumps(dict(train)))


def objects(cluster: Cluster, keys: Mapping[str, str]) -> dict[str, bytes]:
    """All that the store holds."""
    return {key: bytes.fromhex(data) for key, data in _asked(cluster, keys, "objects", f"s3://{BUCKET}").items()}


def _asked(cluster: Cluster, keys: Mapping[str, str], *question: str) -> Any:
    argv = [sys.executable, "-m", "support.cluster_jobs", *question]
    env = reached(cluster, keys)
    return json.loads(cluster.run(argv, env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}).splitlines()[-1])


def _supervised(url: str, train: Mapping[str, Any]) -> list[int]:
    dump = Dump.open(url)
    run, names = dump.provenance, ("shuffle_window_units", "shuffle_block_units", "global_batch_size")
    window, block, batch = (train[name] for name in names)
    order = Order(
        samples=run.corpus.samples,
        samples_per_unit=run.samples_per_unit,
        window_units=window,
        block_units=block,
        seed=0,
    )
    mix = Mix(orders=(order,), shares=(order.samples,), global_batch_size=batch)
    units = [dump.read_unit(unit) for unit in range(run.units)]
    counts = [int(rows.row(place).loss_mask.sum()) for rows in units for place in range(len(rows))]
    epoch = [mix.step_samples(step).tolist() for step in range(mix.steps_per_epoch)]
    assert sorted(sample for samples in epoch for sample in samples) == list(range(len(counts)))
    steps = range(mix.steps_per_epoch * train["epochs"])
    return [sum(counts[sample] for sample in mix.step_samples(step)) for step in steps]


def _objects(url: str) -> dict[str, str]:
    store = object_store(url, {})
    found = [entry["path"] for batch in obstore.list(store) for entry in batch]
    return {key: bytes(obstore.get(store, key).bytes()).hex() for key in found}


if __name__ == "__main__":
    kind, where, *rest = sys.argv[1:]
    print(json.dumps(_supervised(where, json.loads(rest[0])) if kind == "supervised" else _objects(where)))
