"""`llm-neo status`: what it says of dumps and runs, and that no clock is believed but that which dates the files."""

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_lines import Call
from support.dumps import TOKENIZER, make_dump, some_provenance, unit_rows
from support.engine_jobs import some_event
from support.s3_servers import BUCKET, READER, TinyS3, options, seaweedfs

from pipeline.status import FEWEST_UNITS, READ_RECORDS, WINDOW_SECONDS, Watcher, folder_clock, recent_pace, run_status
from storage_schemas.common.exits import Exit
from storage_schemas.config import DumpSection
from storage_schemas.provenance import Provenance
from storage_schemas.records import CommitRecord, data_key, record_key
from storage_schemas.stores.store import Store
from storage_schemas.writer import DumpWriter
from student_train.checkpoint import Checkpoints, TrainState
from student_train.metrics import Event

DUMP_KEYS = {
    "url", "begun", "sealed", "fingerprint", "units", "units_done", "samples", "samples_done", "tokens",
    "supervised_tokens", "bytes", "estimated", "units_per_minute", "tokens_per_second", "eta_seconds",
    "seconds_since_last_unit", "stalled",
}  # fmt: skip
RUN_KEYS = {
    "output", "begun", "finished", "step", "steps", "epoch", "loss", "ce", "kl", "learning_rate", "tokens_per_second",
    "eta_seconds", "seconds_since_last_step", "checkpoint_step", "seconds_since_checkpoint", "dumps",
}  # fmt: skip
HOUR = 3600.0
PROVENANCE = some_provenance(samples=80, samples_per_unit=4)


@pytest.fixture(autouse=True)
def no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


def look(call: Call, *arguments: object) -> dict[str, Any]:
    code, out, err = call("status", *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    assert set(found) == {"dump", "others", "heldout", "run"}
    assert set(found["dump"]) == DUMP_KEYS
    return found


def begin(url: str, units: range, given: dict[str, str] | None = None) -> DumpWriter:
    writer = DumpWriter.open(url, PROVENANCE, options=given)
    writer.put_tokenizer(TOKENIZER)
    for unit in units:
        assert writer.commit_unit(unit, unit_rows(PROVENANCE, unit)) is not None
    return writer


def date(folder: Path, times: list[float]) -> None:
    """Date commit records, as the clock of a file system would have."""
    for file, then in zip(sorted((folder / "commits").glob("*.json")), times, strict=True):
        os.utime(file, (then, then))


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    """A dump of 20 units, 12 of them committed, half a minute apart, the last one now."""
    begin(str(tmp_path / "dump"), range(12))
    date(tmp_path / "dump", [time.time() - 30 * (11 - i) for i in range(12)])
    return tmp_path / "dump"


def test_a_growing_dump(growing: Path, call: Call) -> None:
    found = look(call, growing)["dump"]
    records = [CommitRecord.from_json(f.read_bytes(), name="record") for f in (growing / "commits").glob("*.json")]
    assert (found["units_done"], found["units"], found["samples_done"], found["samples"]) == (12, 20, 48, 80)
    for name in ("tokens", "supervised_tokens", "bytes"):
        assert found[name] == sum(getattr(record, name) for record in records)
    assert (found["begun"], found["sealed"], found["estimated"], found["stalled"]) == (True, False, False, False)
    assert found["units_per_minute"] == pytest.approx(2, rel=1e-4)
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / 12 / 30, rel=1e-4)
    assert found["eta_seconds"] == pytest.approx(8 * 30, rel=1e-4)
    assert 0 <= found["seconds_since_last_unit"] < 30
    out = call("status", growing)[1]
    for said in ("12 of 20 units", "48 of 80", "2.00 units/min", "0:04:00 left", "last unit"):
        assert said in out


def test_nothing_of_it_is_written(growing: Path, call: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in growing.rglob("*")}
    folder = growing.stat().st_mtime_ns
    look(call, growing)
    assert {path: path.stat().st_mtime_ns for path in growing.rglob("*")} == before
    assert growing.stat().st_mtime_ns == folder or not hasattr(os, "O_TMPFILE")


def test_a_folder_that_cannot_be_written_to_has_no_clock() -> None:
    assert folder_clock(Path("/proc/self")) is None
    assert folder_clock(Path("/nowhere")) is None


@pytest.mark.parametrize("hours", [-30, 7])
def test_this_machines_clock_does_not_matter(
    hours: int, growing: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + hours * HOUR)
    found = look(call, growing)["dump"]
    assert found["units_per_minute"] == pytest.approx(2, rel=1e-4)
    assert found["eta_seconds"] == pytest.approx(240, rel=1e-4)
    assert 0 <= found["seconds_since_last_unit"] < 30
    assert not found["stalled"]


def test_a_clock_that_others_dated_the_records_with_is_not_compared(growing: Path, call: Call) -> None:
    """Some network file systems leave it to the clients, whose clocks may be ahead."""
    date(growing, [time.time() + 5 * HOUR - 30 * (11 - i) for i in range(12)])
    found = look(call, growing)["dump"]
    assert found["seconds_since_last_unit"] is None
    assert found["units_per_minute"] == pytest.approx(2, rel=1e-4)
    assert "last unit" not in call("status", growing)[1]


def test_a_dump_that_has_stalled(growing: Path, call: Call) -> None:
    date(growing, [time.time() - 3 * HOUR - 30 * (11 - i) for i in range(12)])
    found = look(call, growing)["dump"]
    assert (found["stalled"], found["eta_seconds"]) == (True, None)
    assert 3 * HOUR <= found["seconds_since_last_unit"] < 3 * HOUR + 60
    assert "no unit in the last 3:00:" in call("status", growing)[1]


def test_a_slow_first_unit_is_no_pause(growing: Path, call: Call) -> None:
    """What the second one takes is told by what the first one has taken."""
    for file in sorted((growing / "commits").glob("*.json"))[1:]:
        file.unlink()
    now = time.time()
    date(growing, [now - 2 * HOUR])
    for begun, stalled in ((now - 3 * HOUR, False), (now - 2.2 * HOUR, True)):
        os.utime(growing / "run.json", (begun, begun))
        assert look(call, growing)["dump"]["stalled"] == stalled


def test_the_pace_of_the_last_minutes() -> None:
    steady = [60.0 * i for i in range(1000)]
    assert recent_pace(steady).units_per_second == pytest.approx(1 / 60)
    # Faster by now, slow before.
    assert recent_pace([*(600.0 * i for i in range(10)), *(5400 + 10.0 * i for i in range(1, 200))]).units_per_second \
        == pytest.approx(0.1)  # fmt: skip
    # Eight workers that commit within a second of each other, every 250 seconds.
    bursts = [250.0 * burst + worker / 8 for burst in range(6) for worker in range(8)]
    assert recent_pace(bursts).units_per_second == pytest.approx(8 / 250, rel=0.01)
    # Stopped over night, and gone on.
    assert recent_pace([*steady, *(steady[-1] + 12 * HOUR + 30 * i for i in range(5))]).units_per_second \
        == pytest.approx(1 / 30)  # fmt: skip
    # An hour per unit: more than the window holds is asked.
    assert WINDOW_SECONDS < HOUR
    assert recent_pace([HOUR * i for i in range(50)]).units_per_second == pytest.approx(1 / HOUR)
    assert FEWEST_UNITS == 3
    # Too little to tell.
    assert recent_pace([5.0]).units_per_second is None
    assert recent_pace([5.0, 5.0]).units_per_second is None
    assert recent_pace([5.0, 7.0]).units_per_second == 0.5


class OtherTimes(TinyS3):
    """An object store whose clock, and so the dates of its objects, are months away from this machine's."""

    now = datetime(2026, 1, 1, 5, tzinfo=UTC)

    def answer(self, method: str, key: str, query: dict[str, list[str]], body: bytes, only_new: bool) -> Any:
        status, data, fault = super().answer(method, key, query, body, only_new)
        if "list-type" in query and method == "GET":
            parts = data.split(b"<Contents>")
            for place, part in enumerate(parts[1:], 1):
                age = timedelta(seconds=20 * (len(parts) - place))
                then = (self.now - age).strftime("%Y-%m-%dT%H:%M:%S.000Z").encode()
                parts[place] = re.sub(rb"(?<=<LastModified>)[^<]*", then, part)
            data = b"<Contents>".join(parts)
        return status, data, fault


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherTimes]:
    server = OtherTimes()
    date = format_datetime(server.now, usegmt=True)
    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_: date)
    yield server
    server.close()


def arguments(url: str, given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Secrets are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given["access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", given["secret_access_key"])
    return [url, "--store", f"endpoint={given['endpoint']}", "--store", "region=us-east-1"]


def test_a_store_has_its_own_time(elsewhere: OtherTimes, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(elsewhere.port)
    begin(f"s3://{BUCKET}/a", range(5), given)
    found = look(call, *arguments(f"s3://{BUCKET}/a", given, monkeypatch))["dump"]
    assert found["units_per_minute"] == pytest.approx(3)
    assert found["eta_seconds"] == pytest.approx(15 * 20)
    assert found["seconds_since_last_unit"] == 20
    assert not found["stalled"]


def test_of_many_units_few_records_are_read(elsewhere: OtherTimes, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    units, given = 700, options(elsewhere.port)
    provenance = some_provenance(samples=4 * 1000 - 1, samples_per_unit=4)
    DumpWriter.open(f"s3://{BUCKET}/a", provenance, options=given)
    for unit in range(units):
        elsewhere.objects[f"{BUCKET}/a/{record_key(unit)}"] = synthetic_record(provenance, unit).to_json()
    elsewhere.requests.clear()
    found = look(call, *arguments(f"s3://{BUCKET}/a", given, monkeypatch))["dump"]
    assert (found["units_done"], found["samples_done"], found["estimated"]) == (units, 4 * units, True)
    assert (found["tokens"], found["supervised_tokens"]) == (100 * units, 50 * units)
    assert found["bytes"] == pytest.approx(units * (10_000 + (units - 1) / 2), rel=0.01)
    assert len(elsewhere.requests) <= READ_RECORDS + 6
    assert len({key for _, key in elsewhere.requests if "/commits/" in key}) == READ_RECORDS


def synthetic_record(provenance: Provenance, unit: int) -> CommitRecord:
    digest = hashlib.sha256(str(unit).encode()).hexdigest()
    return CommitRecord(
        fingerprint=provenance.fingerprint, unit=unit, file=data_key(unit, digest[:32]), bytes=10_000 + unit,
        sha256=digest, rows=4, tokens=100, supervised_tokens=50, entries=400, max_id=99, statuses={"ok": 4},
        mean_kept_mass=0.98, mean_entropy=1.2, fidelity=(5e-5,), logprob_step=0.0625,
    )  # fmt: skip


def test_a_reader_of_a_real_object_store(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{BUCKET}/deep/a"
    with seaweedfs(tmp_path) as port:
        given = arguments(url, options(port, READER), monkeypatch)
        code, out, err = call("status", *given, "--json")
        assert (code, out) == (Exit.TEMPORARY, "")
        assert f"there is no dump at {url} yet" in err
        writer = begin(url, range(3), options(port))
        time.sleep(2)
        writer.commit_unit(3, unit_rows(PROVENANCE, 3))
        found = look(call, *given)["dump"]
        assert (found["units_done"], found["sealed"]) == (4, False)
        assert found["units_per_minute"] > 0
        assert 0 <= found["seconds_since_last_unit"] < 60
        for unit in range(4, PROVENANCE.units):
            writer.commit_unit(unit, unit_rows(PROVENANCE, unit))
        assert writer.seal()
        found = look(call, *given)["dump"]
        assert (found["units_done"], found["sealed"], found["units_per_minute"]) == (20, True, None)
        assert READER["secret_access_key"] not in out + err


def test_what_is_not_there_yet_is_temporary(tmp_path: Path, call: Call) -> None:
    for more in ([], ["--watch"]):
        code, out, err = call("status", tmp_path / "nowhere", *more)
        assert (code, out) == (Exit.TEMPORARY, "")
        assert "there is no dump at" in err
    assert not (tmp_path / "nowhere").exists()
    make_dump(tmp_path / "dump")
    code, out, err = call("status", tmp_path / "dump", tmp_path / "run")
    assert (code, out) == (Exit.TEMPORARY, "")
    assert "there is no run in" in err


def test_a_wrong_command_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "c.yaml").write_text("dump: {url: dump}\n")
    wrong = [["absent.yaml"], [tmp_path, "--set", "dump.url=x"], [tmp_path / "c.yaml", "--store", "region=x"],
             [tmp_path, "--watch", "0"], []]  # fmt: skip
    for words in wrong:
        assert call("status", *words)[:2] == (Exit.USAGE, "")


def test_a_configuration_names_both_dumps_and_the_run(tmp_path: Path, call: Call) -> None:
    make_dump(tmp_path / "dump")
    text = f"""
    dump: {{url: {tmp_path}/dump}}
    heldout: {{url: {tmp_path}/heldout, sources: [{{path: x.jsonl}}]}}
    train: {{output: {tmp_path}/run}}
    """
    (tmp_path / "c.yaml").write_text(text)
    found = look(call, tmp_path / "c.yaml")
    assert found["dump"]["sealed"]
    assert (found["heldout"]["begun"], found["run"]["begun"]) == (False, False)
    assert set(found["run"]) == RUN_KEYS
    assert call("status", tmp_path / "c.yaml")[1].count("not begun") == 2
    make_dump(tmp_path / "heldout")
    # All that there is is done: the run has not begun, and may never here.
    code, out, _ = call("status", tmp_path / "c.yaml", "--watch")
    assert code == 0
    assert out == "dump: sealed, 3 of 3 units; held-out dump: sealed, 3 of 3 units; run: not begun\n"


def test_a_configuration_names_all_dumps_that_are_mixed(tmp_path: Path, call: Call) -> None:
    """Each with its state, and with its losses where the run has told them; nothing is done before all are sealed."""
    make_dump(tmp_path / "dump")
    text = f"""
    dump: {{url: {tmp_path}/dump}}
    train: {{output: {tmp_path}/run, dumps: [{{url: {tmp_path}/dump/}}, {{url: {tmp_path}/other, weight: 2}}]}}
    """
    (tmp_path / "c.yaml").write_text(text)
    found = look(call, tmp_path / "c.yaml")
    assert [(of["url"], of["begun"]) for of in found["others"]] == [(f"{tmp_path}/other", False)]
    (tmp_path / "run").mkdir()
    losses = {"loss": 3.5, "ce": 4.5, "kl": 2.5, "supervised_tokens": 8}
    event = some_event(7, dumps={"dump": losses | {"loss": 1.5}, "other": losses})
    (tmp_path / "run" / "events.jsonl").write_text(event.model_dump_json() + "\n")
    assert look(call, tmp_path / "c.yaml")["run"]["dumps"]["other"] == losses
    told = call("status", tmp_path / "c.yaml")[1]
    assert re.search(r"other +3\.5000, cross-entropy 4\.5000, divergence 2\.5000", told)
    assert told.count("not begun") == 1
    make_dump(tmp_path / "other", seal=False)
    status = Watcher(str(tmp_path / "dump"), options={}, others=[DumpSection(url=str(tmp_path / "other"))]).look()
    assert status.dump.sealed
    assert not status.done


def test_a_run_is_read_from_its_end(tmp_path: Path) -> None:
    values = {"epoch": 1.0, "loss": 2.0, "ce": 1.0, "kl": 3.0, "learning_rate": 1e-4, "grad_norm": 1.0}
    values |= {"supervised_tokens": 9, "tokens_per_second": 5.0, "data_wait_seconds": 0.0, "eta_seconds": 60.0}
    with (tmp_path / "events.jsonl").open("w") as file:
        for step in range(1, 5001):
            file.write(Event.model_validate(values | {"step": step}).model_dump_json() + "\n")
        file.write('{"step": 5001, "epo')
    found = run_status(tmp_path)
    assert (found.begun, found.finished, found.step, found.steps, found.loss) == (True, False, 5000, None, 2.0)
    assert found.seconds_since_last_step is not None
    (tmp_path / "summary.json").write_text('{"steps": 4000}')  # Of before the run was extended.
    assert not run_status(tmp_path).finished
    (tmp_path / "summary.json").write_text('{"steps": 5000}')
    assert run_status(tmp_path).finished


def test_checkpoints_may_lie_in_a_store(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose directory is lost they are all that there is; of another run they say nothing."""
    output, elsewhere = tmp_path / "run", f"s3://{BUCKET}/runs/a"
    with seaweedfs(tmp_path) as port:
        begin(f"s3://{BUCKET}/dump", range(3), options(port))
        arguments("", options(port, READER), monkeypatch)
        text = f"""
        dump: {{url: s3://{BUCKET}/dump, storage_options: {{endpoint: "http://127.0.0.1:{port}", region: us-east-1}}}}
        train: {{output: {output}, checkpoint_url: {elsewhere}}}
        """
        (tmp_path / "c.yaml").write_text(text)
        assert not look(call, tmp_path / "c.yaml")["run"]["begun"]
        checkpoints = Checkpoints(elsewhere, options=options(port))
        for step in (10, 20):
            state = TrainState(step=step, updates=step, consumed="0" * 64, identity={"train.max_steps": 40})
            checkpoints.save(state, [("master/a", torch.zeros(2))], keep=2)
        found = look(call, tmp_path / "c.yaml")["run"]
        assert (found["begun"], found["finished"]) == (True, False)
        assert (found["step"], found["steps"], found["checkpoint_step"]) == (20, 40, 20)
        assert 0 <= found["seconds_since_checkpoint"] < 60
        # A checkpoint that is being written is none yet.
        Store(elsewhere, options=options(port)).delete("step-00000020/COMMIT.json")
        (output / "checkpoints").mkdir(parents=True)
        assert look(call, tmp_path / "c.yaml", output)["run"]["checkpoint_step"] == 10
        code, _, err = call("status", tmp_path / "c.yaml", tmp_path / "other")
        assert (code, "there is no run in" in err) == (Exit.TEMPORARY, True)


def command(*words: object) -> list[str]:
    return [sys.executable, "-P", "-m", "pipeline.entry", "status", *map(str, words)]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_watch_on_a_pipe_ends_with_the_seal(as_json: bool, tmp_path: Path) -> None:
    writer = begin(str(tmp_path / "dump"), range(2))
    words = command(tmp_path / "dump", "--watch", "0.1", *(["--json"] if as_json else []))
    watch = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    first = watch.stdout.readline()
    for unit in range(2, PROVENANCE.units):
        writer.commit_unit(unit, unit_rows(PROVENANCE, unit))
    assert writer.seal()
    rest, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (0, "")
    lines = [first, *rest.splitlines()]
    if as_json:
        assert [json.loads(lines[i])["dump"]["sealed"] for i in (0, -1)] == [False, True]
        assert json.loads(lines[0])["dump"]["units_done"] == 2
    else:
        assert first.startswith("dump: 2 of 20 units")
        assert lines[-1] == "dump: sealed, 20 of 20 units"


def test_a_watch_on_a_terminal_is_drawn_in_place(tmp_path: Path) -> None:
    writer = begin(str(tmp_path / "dump"), range(2))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    watch = subprocess.Popen(
        command(tmp_path / "dump", "--watch", "0.1"), stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while b"2 of 20 units" not in shown:
        shown += os.read(ours, 4096)
    for unit in range(2, PROVENANCE.units):
        writer.commit_unit(unit, unit_rows(PROVENANCE, unit))
    assert writer.seal()
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # What a terminal says when nobody is left.
        pass
    os.close(ours)
    assert watch.wait(60) == 0
    assert b"sealed, 20 of 20 units" in shown
    assert b"\x1b[1A" in shown, "the cursor goes up, and what is there is drawn over"


def test_a_watch_that_nobody_reads_ends(tmp_path: Path) -> None:
    begin(str(tmp_path / "dump"), range(2))
    words = command(tmp_path / "dump", "--watch", "0.1")
    watch = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    assert watch.stdout.readline()
    watch.stdout.close()
    assert watch.wait(60) == Exit.TEMPORARY
    assert watch.stderr is not None
    assert "Traceback" not in watch.stderr.read()


def test_it_does_not_wait_for_torch(growing: Path) -> None:
    script = "import sys; from pipeline.status import Watcher; from pathlib import Path; \
Watcher(sys.argv[1], options={}, run=Path('nowhere')).look(); \
assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, str(growing)], check=True)
