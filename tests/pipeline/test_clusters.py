"""The two stages on two real Slurm clusters that never meet: the files of `examples/slurm`, as they are.

What is pretended are the GPUs. Clusters, their networks, batch scripts, DeepSpeed and the object store are real.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from support.cluster_jobs import (
    CONFIG,
    DUMP,
    PROXIED,
    SMALL,
    TRAIN,
    URL,
    environment,
    events,
    hold_dump,
    objects,
    prepare,
    reached,
    supervised_per_step,
    unit_committed_by,
)
from support.s3_proxy import Request
from support.s3_servers import Identities
from support.slurm import GOING, KILL_WAIT, Cluster, Network, SharedStore, exit_of, need_slurm, two_clusters, until

from storage_schemas.common.exits import Exit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WRITER = {"access_key_id": "canary-01-writer", "secret_access_key": "canary-02-written"}
READER = {"access_key_id": "canary-03-reader", "secret_access_key": "canary-04-readers"}
IDENTITIES: Identities = {"writer": (WRITER, ("Admin", "Read", "Write", "List")), "reader": (READER, ("Read", "List"))}
RUNS = ("plain", "troubled")
BY_MAKE = "--set dump.url=s3://logits/by-make"
CARRIED = {
    "HF_TOKEN": "canary-05-hub",
    "WANDB_API_KEY": "canary-06-tracker",
    "AZURE_STORAGE_ACCOUNT_KEY": "canary-07-azure",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "canary-08-google",
}
"""Secrets that every job has in its environment, beside its keys of the store."""
EXPIRED = {
    "AWS_ACCESS_KEY_ID": "canary-13-expired",
    "AWS_SECRET_ACCESS_KEY": "canary-14-once",
    "AWS_SESSION_TOKEN": "canary-15-token",
}
ONE_NODE = (*SMALL, "--nodes=1", "--gpus-per-node=1")
TRAINING = {"global_batch_size": 8, "micro_batch_size": 4, "epochs": 2, "save_steps": 10}
TRAINING |= {"shuffle_window_units": 2, "shuffle_block_units": 2}
Site = tuple[Cluster, Cluster, SharedStore, Network]


@pytest.fixture
def clusters() -> Iterator[Site]:
    need_slurm()
    with two_clusters(IDENTITIES, nodes={"teacher": 2, "student": 2}, gpus={"teacher": 1, "student": 1}) as found:
        yield found


def job_environment(keys: Mapping[str, str], **more: str) -> dict[str, str]:
    return environment(keys, **CARRIED, **more)


def assert_no_secret(clusters: Site) -> None:
    """In nothing that jobs have written: logs, run directories, caches, and all objects of the store."""
    teacher, student, _, _ = clusters
    searched = 0
    for path in (path for cluster in (teacher, student) for path in cluster.home.rglob("*") if path.is_file()):
        if not path.name.startswith("refused-"):
            assert b"canary-" not in path.read_bytes(), path
            searched += 1
    held = objects(student, READER)
    assert not [key for key, data in held.items() if b"canary-" in data]
    assert searched > 20


def test_the_clusters_cannot_reach_each_other(clusters: Site) -> None:
    teacher, student, _, network = clusters
    for here, there in ((teacher, student), (student, teacher)):
        for port in (6817, 7000):  # The same ones on both.
            assert not network.reaches(here.name, network.address(here.name, 10 if port == 6817 else 11), port)
            told = network.reaches(here.name, network.address(there.name, 10 if port == 6817 else 11), port)
            assert "Network is unreachable" in told
        assert not network.reaches(here.name, network.address(here.name, 1), 8333)
    credential = f"munge -n --socket={teacher.socket} | unmunge --socket={student.socket}"
    assert "Invalid credential" in student.run(["bash", "-c", credential], check=False)
    foreign = student.folder / "slurm/foreign.conf"
    foreign.write_text(student.configuration.read_text().replace(str(student.socket), str(teacher.socket)))
    assert "student-1" not in student.run(["sinfo", "--Node"], {"SLURM_CONF": str(foreign)}, check=False)
    assert "Invalid credential" in (student.folder / "slurm/slurmctld.log").read_text()
    assert "student-1" in student.run(["sinfo", "--Node"])


def test_training_follows_a_dump_on_a_cluster_that_it_never_meets(clusters: Site) -> None:
    """Through the loss of a node, a store that hangs, time limits, and a cancelled job on other nodes.

    Nothing here hopes to come in time: the dump is held at a unit, and so is the training that follows it.
    """
    teacher, student, store, _ = clusters
    prepare(teacher, student, samples=320, samples_per_unit=10, hidden_size=128, layers=2, train=TRAINING)

    def all_logs() -> str:
        return teacher.logs() + student.logs()

    def trained(steps: int) -> int:
        until(lambda: len(events(student)) >= steps, all_logs)
        assert "COMPLETED" not in teacher.states(dump), "the dump was over before training followed it"
        return len(events(student))

    def restarts() -> dict[str, int]:
        return {task["ArrayTaskId"]: int(task["Restarts"]) for task in teacher.jobs(dump)}

    def committing(said: str | None) -> set[int]:
        """Ranks whose commits were answered so, or with nothing by the proxy, since `seen` was cleared."""
        units = [unit_committed_by(request) for request, answer in list(store.proxy.seen) if answer == said]
        return {unit % 2 for unit in units if unit is not None}

    # Training comes first, and waits. It follows as far as the dump is: 8 units of 10 samples are 10 steps.
    hold_dump(store.proxy, units=8)
    options = [*SMALL, "--gpus-per-node=1", "--time=30"]
    training = student.submit(TRAIN, CONFIG, options=options, env=job_environment(READER))
    until(lambda: "waiting for stage one" in student.logs(), all_logs)
    options = [*SMALL, "--array=0-1", "--time=30"]
    dump = teacher.submit(DUMP, CONFIG, options=options, env=job_environment(WRITER, **PROXIED))
    trained(1)

    # A node of the teacher's is lost: its task is queued again, and runs when the node is back.
    teacher.kill_node("teacher-2")
    until(lambda: 1 in restarts().values(), all_logs)
    store.proxy.seen.clear()
    teacher.start_node("teacher-2")
    assert trained(10) == 10
    until(lambda: committing("SlowDown") == {0, 1}, all_logs)

    # The store hangs for half a minute or more: training waits for it. The dump's time limit comes meanwhile: its tasks
    # stop, in the middle of their requests, and queue themselves again.
    store.hang()
    store.proxy.seen.clear()
    hold_dump(store.proxy, units=16)
    until(lambda: committing(None) == {0, 1}, all_logs)
    began, before = time.monotonic(), restarts()
    teacher.warn_of_time_limit(dump)

    def last_words() -> list[float]:
        """When tasks have written to their logs for the last time, that say there that they have stopped."""
        return [path.stat().st_mtime for path in teacher.log_files() if "stopped" in path.read_text()]

    def queued_again() -> bool:
        assert "TIMEOUT" not in teacher.states(dump), f"a task did not stop when it was warned: {teacher.logs()}"
        return all(count > before[task] for task, count in restarts().items())

    stopped = max(until(lambda: len(found := last_words()) == 2 and found, all_logs))
    until(queued_again, all_logs)
    teacher.set_time_limit(dump, 30)
    warned = min(datetime.fromisoformat(at) for at in re.findall(r"STEP .* CANCELLED AT (\S+) ", teacher.logs()))
    assert datetime.fromtimestamp(stopped) - warned < KILL_WAIT, teacher.logs()
    time.sleep(max(0, 30 - (time.monotonic() - began)))
    # A store that was away for longer than requests are repeated lets training leave, to be queued again.
    assert set(student.states(training)) <= GOING, "training did not wait for the store"
    # It is switched off and on again, and both go on.
    assert len(events(student)) == 10
    store.kill()
    store.start()
    assert trained(20) == 20

    # The training's time limit comes: a checkpoint, and the job queues itself again.
    restarted = int(student.jobs(training)[0]["Restarts"])
    student.warn_of_time_limit(training)
    until(lambda: int(student.jobs(training)[0]["Restarts"]) > restarted, all_logs)
    assert "training was asked to stop, and has stopped after step 20 of 80" in student.logs()
    student.set_time_limit(training, 30)

    # It is cancelled on its way, stays so, and goes on as another job on one node instead of two.
    hold_dump(store.proxy, units=30)
    trained(22)
    student.run(["scancel", str(training)])
    assert [job["JobState"] for job in student.ended(training)] == ["CANCELLED"]
    cancelled = len(events(student))
    assert "COMPLETED" not in teacher.states(dump), "the dump was over before training was cancelled"
    again = student.submit(TRAIN, CONFIG, options=ONE_NODE, env=job_environment(READER))
    hold_dump(store.proxy, units=32)
    assert [job["JobState"] for job in student.ended(again)] == ["COMPLETED"], all_logs()
    assert student.states(training) == ["CANCELLED"]
    assert [job["JobState"] for job in teacher.ended(dump)] == ["COMPLETED"] * 2

    # Sealed, and read with keys that cannot write; every sample was trained on once per epoch.
    told = student.run(
        [str(Path(sys.executable).parent / "llm-neo"), "verify", URL, "--json"], reached(student, READER)
    )
    verified = json.loads(told[: told.rindex("}") + 1])
    assert (verified["ok"], verified["units"], verified["rows"]) == (True, 32, 320)
    expected = supervised_per_step(student, READER, TRAINING)
    found = events(student)
    assert [event["step"] for event in found] == list(range(1, 81))
    assert [event["supervised_tokens"] for event in found] == expected
    assert sum(expected) == 2 * verified["supervised_tokens"]
    summary = json.loads((student.home / "runs/a/summary.json").read_text())
    assert summary["supervised_tokens"] == sum(expected)
    assert summary["resumed_from"] == cancelled
    assert (summary["world_size"], summary["steps"]) == (1, 80)
    assert (student.home / "runs/a/final/adapter_model.safetensors").is_file()
    assert_no_secret(clusters)


def test_what_cannot_work_is_refused_on_the_cluster_and_not_queued_again(clusters: Site) -> None:
    teacher, student, store, _ = clusters
    prepare(teacher, student, samples=8, samples_per_unit=4, hidden_size=32, layers=1, train=TRAINING)
    first = teacher.submit(DUMP, CONFIG, options=[*SMALL, "--array=0"], env=job_environment(WRITER))
    assert [job["JobState"] for job in teacher.ended(first)] == ["COMPLETED"], teacher.logs()
    # Somebody on the student's cluster has a teacher and a corpus, too, and keys that do not write.
    (student.home / "corpus.jsonl").write_bytes((teacher.home / "corpus.jsonl").read_bytes())
    store.proxy.error = lambda request: "ExpiredToken" if request.access_key == EXPIRED["AWS_ACCESS_KEY_ID"] else None
    refused: dict[tuple[str, int], tuple[int, str]] = {}

    def dump(says: str, *arguments: str, on: Cluster = teacher, code: int = Exit.MISMATCH, **env: str) -> None:
        given = job_environment(WRITER if on is teacher else READER) | env
        job = on.submit(DUMP, *(arguments or (CONFIG,)), options=[*SMALL, "--array=0"], env=given)
        refused[on.name, job] = code, says

    def train(says: str, *arguments: str, nodes: int = 1, code: int = Exit.MISMATCH, **env: str) -> None:
        options = [*SMALL, f"--nodes={nodes}", "--gpus-per-node=1"]
        given = {name: value for name, value in (job_environment(READER, MAX_RESTARTS="0") | env).items() if value}
        output = f"train.output=runs/{len(refused)}"
        job = student.submit(TRAIN, CONFIG, "--set", output, *arguments, options=options, env=given)
        refused[student.name, job] = code, says

    def config(name: str, **changes: object) -> str:
        text = yaml.safe_load((teacher.home / CONFIG).read_text()) | changes
        (teacher.home / name).write_text(yaml.safe_dump(text))
        return name

    reader = ("--set", "teacher.model=models/student", "--set", "dump.url=s3://logits/by-reader")
    dump("no access to s3://logits/by-reader", CONFIG, *reader, on=student)
    dump("check the credentials in the environment", AWS_SECRET_ACCESS_KEY="canary-09-wrong")
    dump("estimator.k", CONFIG, "--set", "estimator.k=4")
    dump("RANK", RANK="3", WORLD_SIZE="2")
    dump("SLURM_ARRAY_TASK_ID", RANK="1", WORLD_SIZE="2")
    dump("has GPUs that torch cannot use", CONFIG, "--set", "teacher.device=auto")
    dump("the clock of this machine is not that of s3://logits/run", **teacher.other_clock(ahead=timedelta(hours=5)))
    dump("the credentials for s3://logits/run have expired", **PROXIED, **EXPIRED)
    train("has GPUs that torch cannot use", DS_ACCELERATOR="")
    train("the clock of this machine is not that of s3://logits/run", **student.other_clock(ahead=timedelta(hours=-5)))
    train("the credentials for s3://logits/run have expired", **PROXIED, **EXPIRED)
    train("no run.json after", "--set", "dump.url=s3://logits/none", "--set", "train.data_wait_seconds=2", code=75)
    train("no-such-host", "--rdzv-endpoint", "no-such-host:29500", nodes=2)
    # Secrets in the wrong places.
    url = "s3://canary-10-user:canary-10-password@logits/run"
    options = {"url": URL, "storage_options": {"secret_access_key": "canary-11-option"}}
    dump("environment", config("refused-url.yaml", dump={"url": url}))
    dump("environment", config("refused-option.yaml", dump=options))
    dump("environment", CONFIG, "--set", "dump.storage_options.session_token=canary-12-line")
    for (name, job), (code, says) in refused.items():
        cluster = teacher if name == teacher.name else student
        (found,) = cluster.ended(job)
        said = "".join(
            path.read_text() for path in cluster.log_files() if f"-{job}." in path.name or f"-{job}_" in path.name
        )
        assert says in said, said
        assert "Traceback" not in said
        assert (found["JobState"], exit_of(found), found["Restarts"]) == ("FAILED", code, "0"), said
    assert_no_secret(clusters)

    # The doors for people work in an allocation, too.
    told = teacher.run(["srun", "--ntasks=2", "--nodes=2", *made("dump-teacher", BY_MAKE)], job_environment(WRITER))
    assert told.count("samples      8 (8 ok)") == 2, told
    here = made("train-student", f"{BY_MAKE} --set train.output=runs/by-make", "NPROC=2")
    told = student.run(["srun", "--ntasks=1", *here], job_environment(READER))
    summary = json.loads((student.home / "runs/by-make/summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 2), told
    assert (student.home / "runs/by-make/final/adapter_model.safetensors").is_file()
    assert_no_secret(clusters)


def made(target: str, arguments: str, *variables: str) -> list[str]:
    """The command line of `make`, which here must not install anything."""
    venv = environment(WRITER)["VENV"]
    make = ["make", "-f", str(DUMP.parents[2] / "Makefile"), target, f"CONFIG={CONFIG}", f"ARGS={arguments}"]
    installed = [f"--assume-old={venv}/.installed-{stage}" for stage in ("teacher", "train")]
    return [*make, *variables, f"VENV={venv}", *installed]


def test_neither_a_busy_store_nor_clocks_that_are_apart_change_what_is_made(clusters: Site) -> None:
    """Half of all requests are answered `SlowDown`; the teacher is 14 minutes ahead of the student."""
    teacher, student, store, _ = clusters
    prepare(teacher, student, samples=40, samples_per_unit=4, hidden_size=32, layers=1, train=TRAINING)
    asked: Counter[str] = Counter()

    def error(request: Request) -> str | None:
        """Five in a row are more than the client repeats by itself."""
        asked[request.access_key] += 1
        return "SlowDown" if asked[request.access_key] % 10 < 5 else None

    store.proxy.error = error
    clocks = {WRITER["access_key_id"]: timedelta(minutes=10), READER["access_key_id"]: timedelta(minutes=-4)}
    jobs: list[tuple[Cluster, int]] = []
    for run in RUNS:
        given = [CONFIG, "--set", f"dump.url=s3://logits/{run}", "--set", f"train.output=runs/{run}"]
        for cluster, script, keys, options in (
            (student, TRAIN, READER, ONE_NODE),
            (teacher, DUMP, WRITER, (*SMALL, "--array=0")),
        ):
            trouble = PROXIED | cluster.other_clock(ahead=clocks[keys["access_key_id"]])
            env = job_environment(keys, **(trouble if run == "troubled" else {}))
            jobs.append((cluster, cluster.submit(script, *given, options=options, env=env)))
    for cluster, job in jobs:
        assert [(found["JobState"], found["Restarts"]) for found in cluster.ended(job)] == [("COMPLETED", "0")], (
            cluster.logs()
        )

    for key, ahead in clocks.items():
        mine = [(request, said) for request, said in store.proxy.seen if request.access_key == key]
        assert all(abs(request.ahead - ahead) < timedelta(minutes=1) for request, _ in mine)
        assert [said for _, said in mine].count("SlowDown") > len(mine) / 3 > 5

    held = objects(student, READER)
    shards = [sorted(data for key, data in held.items() if key.startswith(f"{run}/data/")) for run in RUNS]
    assert len(shards[0]) == 10
    assert shards[0] == shards[1]
    adapters = [student.home / "runs" / run / "final/adapter_model.safetensors" for run in RUNS]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
