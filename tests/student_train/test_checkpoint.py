"""Checkpoints: complete or refused, whatever happens while they are written or lie on the disk."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import s3_servers
from support.distributed import Ranks
from support.tiny_student import save_student, write_dump
from torch import Tensor

from storage_schemas.canonical import canonical_json, with_checksum
from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, MismatchError, NothingToResumeError, TemporaryError
from storage_schemas.stores.store import Store
from student_train import checkpoint as checkpoints
from student_train.checkpoint import (
    EXP_AVG,
    EXP_AVG_SQ,
    INITIAL,
    MASTER,
    Checkpoint,
    Checkpoints,
    TrainState,
    exactly,
)
from student_train.resume import choose, refuse_other_run

KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)


def state(step: int, **identity: Any) -> TrainState:
    """A state."""
    return TrainState(step=step, updates=step, consumed="0" * 64, identity=identity or {"train.seed": 1})


def tensors(step: int) -> Iterator[tuple[str, Tensor]]:
    """Some tensors that differ between steps."""
    for kind in KINDS:
        for name in ("b.weight", "a.weight"):
            yield f"{kind}/{name}", torch.arange(6, dtype=torch.float32).reshape(2, 3) + step + len(kind) + ord(name[0])


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    """A directory with checkpoints of some steps."""
    found = Checkpoints(str(folder))
    for step in steps:
        found.save(state(step), tensors(step), keep=keep)
    return found


def newest(found: Checkpoints) -> int | None:
    """Step of the newest complete checkpoint."""
    checkpoint = found.newest()
    return None if checkpoint is None else checkpoint.step


def test_round_trip(tmp_path: Path) -> None:
    """What is read is what was saved, bit for bit, by kind."""
    checkpoint = saved(tmp_path, 7).newest()
    assert checkpoint is not None
    assert checkpoint.state == state(7)
    expected = dict(tensors(7))
    found = dict(checkpoint.tensors(KINDS))
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert {key.split("/")[0] for key, _ in checkpoint.tensors((EXP_AVG,))} == {EXP_AVG}
    names = {path.suffix for path in (tmp_path / "step-00000007").iterdir()}
    assert names == {".json", ".safetensors"}


def test_large_state_goes_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving holds one file in memory, not the whole state."""
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 24)
    checkpoint = saved(tmp_path, 1).newest()
    assert checkpoint is not None
    files = [path.name.split("-", 1)[1] for path in (tmp_path / "step-00000001").glob("*.safetensors")]
    assert sorted(files) == sorted(f"{kind}-{i:03d}.safetensors" for kind in KINDS for i in range(2))
    assert set(dict(checkpoint.tensors(KINDS))) == set(dict(tensors(1)))


@pytest.mark.parametrize("damage", ["flip first", "flip last", "cut", "empty", "gone", "swapped"])
def test_damage_to_any_file_is_found(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each file in turn, the commit record too: the checkpoint is refused, loudly, and the one before is taken."""
    saved(tmp_path / "clean", 1, 2)
    names = sorted(path.name for path in (tmp_path / "clean" / "step-00000002").iterdir())
    assert len(names) == 5
    for number, name in enumerate(names):
        found = saved(tmp_path / str(number), 1, 2)
        folder = tmp_path / str(number) / "step-00000002"
        kind = name.split("-", 1)[-1]
        (file,) = [path for path in folder.iterdir() if path.name.split("-", 1)[-1] == kind]
        data = bytearray(file.read_bytes())
        match damage:
            case "flip first":
                data[0] ^= 1
            case "flip last":
                data[-2] ^= 1
            case "cut":
                del data[-5:]
            case "empty":
                data.clear()
            case "swapped":
                older = tmp_path / str(number) / "step-00000001"
                (other,) = [path for path in older.iterdir() if path.name.split("-", 1)[-1] == kind]
                data = bytearray(other.read_bytes())
        file.unlink()
        if damage != "gone":
            file.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest(found) == 1, name
        assert "step 2 is refused" in caplog.text


def read_exactly(checkpoint: Checkpoint, step: int) -> dict[str, Tensor]:
    """What a resume reads: one tensor of each kind for each parameter, or DataError."""
    shapes = {key: tensor.shape for key, tensor in tensors(step)}
    return dict(exactly(checkpoint.tensors(KINDS), shapes))


def mutated(data: bytes, random: random.Random) -> bytes:
    """One byte, bit, digit or word is another one, or a piece is gone or twice there."""
    changed, at = bytearray(data), random.randrange(len(data))
    match random.randrange(5):
        case 0:
            changed[at] ^= 1 << random.randrange(8)
        case 1:
            changed[at] = random.randrange(256)
        case 2:
            del changed[at : at + random.randrange(1, 200)]
        case 3:
            changed[at:at] = changed[at : at + random.randrange(1, 200)]
        case 4:  # What the file itself consists of, in another place.
            words = [match.span() for match in re.finditer(rb'"[a-z0-9_]+"|[0-9]+', data)]
            (start, stop), (first, last) = random.sample(words, 2)
            changed[start:stop] = data[first:last]
    return bytes(changed)


def test_mutated_commit_record_never_gives_another_result(tmp_path: Path) -> None:
    """Refused, or all weights and moments as they were."""
    found = saved(tmp_path, 2)
    commit = tmp_path / "step-00000002" / "COMMIT.json"
    data, expected = commit.read_bytes(), read_exactly(found.at(2), 2)
    swaps = [(one, other) for one in KINDS for other in (*KINDS, "state", INITIAL, "mastes") if one != other]
    changed = [data.replace(f'"{one}"'.encode(), f'"{other}"'.encode()) for one, other in swaps]
    changed += [mutated(data, random.Random(seed)) for seed in range(600)]
    refused = 0
    for number, content in enumerate(changed):
        commit.write_bytes(content)
        try:
            checkpoint = found.at(2)
            checkpoint.verify()
            read = read_exactly(checkpoint, 2)
        except (DataError, MismatchError):
            refused += 1
            continue
        assert checkpoint.state == state(2), number
        assert read.keys() == expected.keys(), number
        assert all(torch.equal(read[key], value) for key, value in expected.items()), number
    assert refused > 500


def test_what_is_missing_or_left_over_is_named() -> None:
    shapes = {"master/a": (2, 3), "master/b": (2, 3)}
    both = [("master/a", torch.zeros(2, 3)), ("master/b", torch.zeros(2, 3))]
    assert dict(exactly(both, shapes)).keys() == shapes.keys()
    with pytest.raises(DataError, match="such as master/b"):
        list(exactly(both[:1], shapes))
    for wrong in (("master/c", torch.zeros(2, 3)), ("master/a", torch.zeros(2, 3)), ("master/b", torch.zeros(1, 3))):
        with pytest.raises(DataError, match=wrong[0]):
            list(exactly([both[0], wrong], shapes))


def test_tensors_are_verified_as_they_are_read(tmp_path: Path) -> None:
    """A rank that opens a checkpoint after another has chosen it does not trust it blindly."""
    found = saved(tmp_path, 1)
    checkpoint = found.at(1)
    (file,) = (tmp_path / "step-00000001").glob("*-master-*")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="is not the file that was written"):
        list(checkpoint.tensors((MASTER,)))


def test_death_at_every_step_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest complete checkpoint is the old one or the new one, never nothing; saving again then succeeds."""

    class Death(BaseException):
        """The end of the process."""

    passed: list[str] = []
    monkeypatch.setattr(faults, "point", passed.append)
    saved(tmp_path / "count", 1, 2, keep=1)
    points = len(passed) // 2
    assert points > 20
    outcomes = []
    for end in range(points):
        folder = tmp_path / str(end)
        monkeypatch.setattr(faults, "point", lambda name: None)
        found = saved(folder, 1, keep=1)
        left = iter(range(end))

        def die(name: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Death(name)

        monkeypatch.setattr(faults, "point", die)
        with pytest.raises(Death):
            found.save(state(2), tensors(2), keep=1)
        monkeypatch.setattr(faults, "point", lambda name: None)
        outcomes.append(newest(Checkpoints(str(folder))))
        again = saved(folder, 2, keep=1)
        assert newest(again) == 2
        assert again.steps() == [2]
    assert set(outcomes) == {1, 2}
    assert outcomes == sorted(outcomes)


def test_a_file_is_hashed_once_and_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for commit record and state: who reads a checkpoint compares the hashes."""
    hashed, read = [], []
    digest, get = hashlib.sha256, Store.get
    monkeypatch.setattr(hashlib, "sha256", lambda data=b"": [hashed.append(len(data)), digest(data)][1])
    monkeypatch.setattr(Store, "get", lambda store, key: [read.append(key), get(store, key)][1])
    saved(tmp_path, 1)
    sizes = [file.stat().st_size for file in tmp_path.glob("*/*.safetensors")]
    assert len(sizes) == len(KINDS)
    assert all(hashed.count(size) == sizes.count(size) for size in sizes)
    assert sorted(key.split("-", 2)[-1] for key in read) == ["00000001/COMMIT.json", "state.json"]


@pytest.mark.parametrize("how", ["lost", "cut off"])
def test_what_the_store_does_not_keep_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """And the older checkpoint stays although only one is kept."""
    found = saved(tmp_path, 1, keep=1)
    put = Store.put_new

    def keep_less(store: Store, key: str, data: bytes) -> bool:
        if "exp_avg_sq" in key:
            return how == "lost" or put(store, key, data[:-1])
        return put(store, key, data)

    monkeypatch.setattr(Store, "put_new", keep_less)
    with pytest.raises(DataError, match="exp_avg_sq"):
        found.save(state(2), tensors(2), keep=1)
    assert newest(found) == 1


def test_full_disk_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 75, and the older checkpoint stays although only one is kept."""
    found = saved(tmp_path, 1, keep=1)
    monkeypatch.setenv("LLM_NEO_FAULT", "local:write:3:full")
    monkeypatch.setattr(faults, "_passed", {})
    with pytest.raises(TemporaryError, match="ENOSPC"):
        found.save(state(2), tensors(2), keep=1)
    monkeypatch.delenv("LLM_NEO_FAULT")
    assert newest(found) == 1


def test_old_ones_go(tmp_path: Path) -> None:
    """`keep` stay; the record of the start goes with the first that holds weights."""
    found = Checkpoints(str(tmp_path))
    found.save(state(0), iter(()), keep=3)
    assert newest(found) == 0
    for step in (5, 10, 15, 20):
        found.save(state(step), tensors(step), keep=3)
        assert 0 not in found.steps()
    assert found.steps() == [10, 15, 20]


def test_what_an_older_one_needs_stays_as_long_as_it(tmp_path: Path) -> None:
    """The best step of its time, though there is a better one since; a damaged one needs nothing."""
    found = Checkpoints(str(tmp_path))
    for step, best, there in (
        (1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 2, 3]), (4, 4, [1, 3, 4]), (5, 4, [1, 3, 4, 5]), (6, 4, [4, 5, 6]),
        (7, 7, [4, 6, 7]),
    ):  # fmt: skip
        found.save(state(step), tensors(step), keep=2, best=best)
        assert found.steps() == there
    (tmp_path / "step-00000006" / "COMMIT.json").write_bytes(b"{}")
    found.save(state(8), tensors(8), keep=2, best=7)
    assert found.steps() == [6, 7, 8]


@pytest.mark.parametrize("keep", range(1, 21))
def test_as_many_stay_as_asked(tmp_path: Path, keep: int) -> None:
    """After each of many saves."""
    found = Checkpoints(str(tmp_path))
    found.save(state(0), iter(()), keep=keep)
    for step in range(1, 25):
        found.save(state(step), iter(()), keep=keep)
        assert found.steps() == list(range(1, step + 1))[-keep:]


def test_links_are_removed_and_not_what_lies_behind_them(tmp_path: Path) -> None:
    """Whether the step is too old, or written again."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "COMMIT.json").write_text("thesis")
    (mine / "thesis.tex").write_text("thesis")
    found = saved(tmp_path / "run", 3)
    for step in (1, 4):
        (tmp_path / "run" / f"step-{step:08d}").symlink_to(mine)
    found.save(state(4), tensors(4), keep=1)
    assert found.steps() == [4]
    assert newest(found) == 4
    assert {file.name: file.read_text() for file in mine.iterdir()} == dict.fromkeys(
        ("COMMIT.json", "thesis.tex"), "thesis"
    )


def test_another_attempt_at_a_step_replaces_it(tmp_path: Path) -> None:
    """After a fall back the run comes to the refused step again."""
    found = saved(tmp_path, 1, 2)
    (file,) = (tmp_path / "step-00000002").glob("*-master-*")
    file.write_bytes(b"torn")
    assert newest(found) == 1
    found.save(state(2), tensors(2), keep=9)
    assert newest(found) == 2


@pytest.mark.parametrize("file", ["COMMIT.json", "state.json"])
def test_another_version_is_no_damage(tmp_path: Path, file: str) -> None:
    """It is refused by name, and not passed over for an older one."""
    found = saved(tmp_path, 1, 2)
    (path,) = (tmp_path / "step-00000002").glob(f"*{file}")
    text = json.dumps(json.loads(path.read_text()) | {"format_version": 3})
    path.write_text(text)
    if file == "state.json":
        commit = tmp_path / "step-00000002" / "COMMIT.json"
        content = json.loads(commit.read_text())
        (record,) = [record for record in content["files"] if record["kind"] == "state"]
        record |= {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        del content["checksum"]
        commit.write_bytes(canonical_json(with_checksum(content)))
    with pytest.raises(MismatchError, match="another format version"):
        found.newest()


@pytest.mark.parametrize(
    ("resume", "steps", "used", "expected"),
    [
        ("auto", (), False, None),
        ("auto", (1,), True, 1),
        ("auto", (), True, NothingToResumeError),
        ("must", (1,), True, 1),
        ("must", (), False, NothingToResumeError),
        ("never", (), False, None),
        ("never", (1,), False, MismatchError),
        ("never", (), True, MismatchError),
    ],
)
def test_choice(tmp_path: Path, resume: str, steps: tuple[int, ...], used: bool, expected: Any) -> None:
    """`auto`, `must` and `never`, in new directories and in used ones."""
    found = saved(tmp_path / "checkpoints", *steps)
    if isinstance(expected, type):
        with pytest.raises(expected):
            choose(found, resume=resume, used=used)
    else:
        chosen = choose(found, resume=resume, used=used)
        assert (None if chosen is None else chosen.step) == expected


def test_torn_checkpoints_are_traces(tmp_path: Path) -> None:
    """`auto` does not start anew over them."""
    found = saved(tmp_path, 3)
    (tmp_path / "step-00000003" / "COMMIT.json").unlink()
    with pytest.raises(NothingToResumeError, match="no valid checkpoint"):
        choose(found, resume="auto", used=False)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    """Names that are not ours are ignored."""
    found = saved(tmp_path, 3)
    (tmp_path / "step-4").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert found.steps() == [3]
    assert newest(found) == 3


def test_another_run_is_told_field_by_field() -> None:
    """Got is the configuration, expected the checkpoint; a field that is new or gone counts too."""
    refuse_other_run({"train.seed": 1, "train.arm": "neo"}, {"train.arm": "neo", "train.seed": 1})
    with pytest.raises(MismatchError) as error:
        refuse_other_run(
            {"train.seed": 1, "loss.alpha": 0.5, "train.arm": "neo"}, {"train.seed": 2, "train.arm": "neo", "new": True}
        )
    assert "loss.alpha, new, train.seed" in str(error.value)
    assert "got:      loss.alpha = absent; new = True; train.seed = 2" in str(error.value)
    assert "expected: loss.alpha = 0.5; new = absent; train.seed = 1" in str(error.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings of a real object store."""
    with s3_servers.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as port:
        yield s3_servers.options(port)


def test_checkpoints_in_an_object_store(store: dict[str, str]) -> None:
    """Kept, removed, refused and replaced as in a directory; written by who may write alone."""
    url = f"s3://{s3_servers.BUCKET}/runs/a"
    found = Checkpoints(url, options=store)
    assert found.steps() == []
    for step in (0, 1, 2, 3):
        found.save(state(step), tensors(step) if step else iter(()), keep=2, best=1)
    assert found.steps() == [1, 2, 3]
    again = Checkpoints(url, options=store)
    assert newest(again) == 3
    assert {key: tensor.tolist() for key, tensor in again.at(2).tensors(KINDS)} == {
        key: tensor.tolist() for key, tensor in tensors(2)
    }
    files = Store(url, options=store)
    (master,) = (key for key in files.list("step-00000003") if "-master-" in key)
    files.delete(master)
    assert newest(again) == 2
    found.save(state(3), tensors(3), keep=2)
    assert newest(again) == 3
    assert found.steps() == [2, 3]
    found.save(state(3), tensors(3), keep=1)
    assert found.steps() == [3]
    reader = store | {"access_key_id": s3_servers.READER["access_key_id"]}
    reader |= {"secret_access_key": s3_servers.READER["secret_access_key"]}
    with pytest.raises(MismatchError, match="no access to s3://"):
        Checkpoints(url, options=reader).save(state(4), tensors(4), keep=2)
    with pytest.raises(MismatchError, match="no access to s3://"):  # At once, and not after two minutes of repetitions.
        Store(url, options=reader).delete(files.list("step-00000003")[0])


def test_a_run_goes_on_where_its_disk_is_lost(
    store: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another directory, the same checkpoints: the run that was never stopped, bit for bit."""
    write_dump(tmp_path / "dump")
    save_student(tmp_path / "student")
    names = {"endpoint": "AWS_ENDPOINT_URL", "access_key_id": "AWS_ACCESS_KEY_ID"}
    names |= {"secret_access_key": "AWS_SECRET_ACCESS_KEY", "region": "AWS_REGION"}
    for option, variable in names.items():
        if option in store:
            monkeypatch.setenv(variable, store[option])
    job: dict[str, Any] = {"dump": str(tmp_path / "dump"), "model": str(tmp_path / "student")}
    ranks = Ranks("support.train_jobs:trainer", 2)

    def run(name: str, url: str | None, **more: Any) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        settings = {"checkpoint_url": url} if url else {}
        given = job | {"output": str(tmp_path / name), "train": settings} | more
        return ranks.call(job=given)[0]  # type: ignore[no-any-return]

    whole = run("whole", None)
    url = f"s3://{s3_servers.BUCKET}/runs/lost"
    assert run("half", url, stop_after=3)["code"] == 75
    rest = run("elsewhere", url)
    assert rest["code"] == 0, rest["message"]
    again = run("once more", url)
    assert again["code"] == 0, again["message"]
    ranks.close()
    assert not (tmp_path / "half" / "checkpoints").exists()
    assert again["summary"]["loss"] == whole["summary"]["loss"]
    for name in ("supervised_tokens", "steps"):
        assert again["summary"][name] == rest["summary"][name] == whole["summary"][name]
    assert 0 < len(rest["events"]) < 6
    assert [event.loss for event in rest["events"]] == [event.loss for event in whole["events"]][-len(rest["events"]) :]
    one, other = (tmp_path / name / "final" / "adapter_model.safetensors" for name in ("whole", "elsewhere"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "../step-00000007/x-state.json", "a\\b"])
def test_a_record_whose_names_lead_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    """Whatever hashes it claims, and in a store too, where a name with `..` is another object's."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"1")
    saved(tmp_path / "run" / "checkpoints", 7)
    commit = tmp_path / "run" / "checkpoints" / "step-00000007" / "COMMIT.json"
    content = json.loads(commit.read_bytes())
    content.pop("checksum")
    for record in content["files"]:
        record |= {"name": name, "bytes": 1, "sha256": hashlib.sha256(b"1").hexdigest()}
    commit.write_bytes(canonical_json(with_checksum(content)))
    with pytest.raises(DataError, match="plain relative path"):
        Checkpoints(str(tmp_path / "run" / "checkpoints")).at(7)
