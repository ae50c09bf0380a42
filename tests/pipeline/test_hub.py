"""Dumps and models to the Hugging Face hub and back, against a stand-in for its HTTP API."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.command_lines import Call
from support.dumps import make_dump, some_provenance
from support.hub_server import TOKEN, Hub, Repository, hub_server

from pipeline import hub as exchange
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError, UsageError
from storage_schemas.common.exits import Exit
from storage_schemas.config import DumpSection
from storage_schemas.reader import Dump
from storage_schemas.stores.hub import asking
from storage_schemas.stores.store import Store
from storage_schemas.verify import verify
from teacher_dump.dump import refuse_unusable

URL = "hf://datasets/me/dump"
HTTPX = sys.modules[huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
"""httpx, under the name that this huggingface_hub knows it by."""
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # Of huggingface_hub, which asks httpx so.


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, which huggingface_hub takes for the real one."""
    for each in (server.repositories, server.large, server.asked, server.fail, server.damage, server.lose):
        each.clear()
    constants = huggingface_hub.constants
    changed = {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "c"),
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    info = huggingface_hub.HfApi.repo_info

    def with_privacy(self: huggingface_hub.HfApi, repo_id: str, *, repo_type: str, **settings: Any) -> Any:
        found = info(self, repo_id, repo_type=repo_type, **settings)
        found.private = server.repositories[f"{repo_type}s", repo_id].private
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", with_privacy)
    return server


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "dump"
    make_dump(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dump_there_and_back(hub: Hub, dump: Path, tmp_path: Path, call: Call) -> None:
    code, out, err = call("push", str(dump), URL, "--json")
    assert (code, TOKEN in out + err) == (0, False), err
    assert logging.getLogger(HTTPX.__name__).level == logging.WARNING  # Else there is a line per request.
    told = json.loads(out)
    assert told["fingerprint"] == some_provenance().fingerprint
    # A reader meanwhile: run.json first, the seal last.
    added = [
        set(after) - set(before)
        for before, after in zip(*(hub.repositories["datasets", "me/dump"].commits[i:] for i in (0, 1)), strict=False)
    ]
    assert added[0] == {"run.json"}
    assert added[-1] == {"SEALED.json"}
    assert contents(dump) == {name: data for name, data in hub.files("me/dump").items() if name != ".gitattributes"}
    assert hub.repositories["datasets", "me/dump"].private is False

    code, out, err = call("pull", URL, str(tmp_path / "back"), "--json")
    assert code == 0, err
    assert json.loads(out)["commit"] == told["commit"]
    assert contents(tmp_path / "back") == contents(dump)

    # Both again: nothing is transferred.
    hub.asked.clear()
    assert call("push", str(dump), URL)[0] == call("pull", URL, str(tmp_path / "back"))[0] == 0
    assert not [line for line in hub.asked if line.startswith("PUT") or "/commit/" in line]


def test_a_dump_is_read_where_it_lies(hub: Hub, dump: Path, tmp_path: Path, call: Call) -> None:
    exchange.push(dump, URL, private=True)
    code, out, err = call("verify", URL, "--json")
    assert code == 0, err
    assert json.loads(out)["units"] == some_provenance().units
    # At a commit, and in a folder of a repository.
    commit = hub.repositories["datasets", "me/dump"].name(1)
    assert not verify(f"{URL}@{commit}").sealed
    files = hub.files("me/dump")
    hub.repositories["datasets", "me/all"] = Repository([{f"a/b/{name}": data for name, data in files.items()}])
    assert verify("hf://datasets/me/all/a/b").ok
    # A training keeps its shards on the node's disk, by their hash, as those of any store.
    found = Dump.open(URL, cache_dir=tmp_path / "cache")
    assert found.read_unit(0).row(0).sample_id == "sample-0"
    with pytest.raises(DataError, match="larger than it can be"):
        Store(URL).get("run.json", limit=10)
    hub.asked.clear()
    assert found.read_unit(0).row(1).sample_id == "sample-1"
    assert not hub.asked
    # The commit that was there when it was opened, whatever is pushed meanwhile.
    hub.repositories["datasets", "me/dump"].commits.append({})
    assert len(found.read_unit(1)) == 4
    with pytest.raises(DataError, match="there is no dump"):
        Dump.open(URL)


def test_the_hub_is_not_written_to_as_a_store(hub: Hub, dump: Path) -> None:
    exchange.push(dump, URL)
    for act in (
        lambda: refuse_unusable(DumpSection(url=URL)),
        lambda: refuse_unusable(DumpSection(url="hf://datasets/me/new")),
        lambda: Store(URL).put_new("x", b"1"),
        lambda: Store(URL).delete("run.json"),
    ):
        with pytest.raises(MismatchError, match="then `llm-neo push` it"):
            act()


def test_a_push_that_was_stopped_goes_on(hub: Hub, dump: Path, call: Call) -> None:
    hub.fail["PUT /lfs"] = 409
    with pytest.raises(TemporaryError) as failed:
        exchange.push(dump, URL)
    assert TOKEN not in str(failed.value)
    assert set(hub.files("me/dump")) == {".gitattributes", "run.json"}
    code, out, err = call("status", URL, "--json")
    assert (code, json.loads(out)["dump"]["begun"]) == (0, True), err
    with pytest.raises(DataError, match="no sealed dump"):
        exchange.pull(URL, dump.parent / "partial")
    hub.fail.clear()
    exchange.push(dump, URL)
    assert verify(URL).ok


def test_another_dump_is_never_overwritten(hub: Hub, dump: Path, tmp_path: Path) -> None:
    exchange.push(dump, URL)
    before = dict(hub.files("me/dump"))
    make_dump(tmp_path / "other", some_provenance(samples=9))
    with pytest.raises(MismatchError, match="holds another dump"):
        exchange.push(tmp_path / "other", URL)
    hub.repositories["datasets", "me/data"] = Repository([{"train.parquet": b"x"}])
    with pytest.raises(MismatchError, match="holds something else"):
        exchange.push(dump, "hf://datasets/me/data")
    assert hub.files("me/dump") == before


def test_the_card_of_a_dump_that_was_edited_on_the_hub_stays(hub: Hub, dump: Path, call: Call) -> None:
    exchange.push(dump, URL)
    hub.repositories["datasets", "me/dump"].commits.append(hub.files("me/dump") | {"README.md": b"edited"})
    for replace in (False, True):
        exchange.push(dump, URL, replace=replace)
        assert hub.files("me/dump")["README.md"] == b"edited"
    # One that was made with the repository, too.
    hub.repositories["datasets", "me/new"] = Repository([{"README.md": b"mine"}])
    assert call("push", dump, "hf://datasets/me/new")[0] == 0
    assert set(hub.files("me/new")) == set(hub.files("me/dump")) - {".gitattributes"}
    assert hub.files("me/new")["README.md"] == b"mine"
    assert verify("hf://datasets/me/new").ok


@pytest.mark.parametrize("private", [False, True])
def test_what_shall_be_private_goes_to_no_public_repository(hub: Hub, dump: Path, call: Call, private: bool) -> None:
    hub.repositories["datasets", "me/dump"] = Repository(private=private)
    code, _, err = call("push", dump, URL, "--private")
    assert (code, "is public" in err) == ((0, False) if private else (Exit.MISMATCH, True)), err
    assert ("run.json" in hub.files("me/dump")) is private


def test_two_dumps_do_not_mix_where_pushes_meet(hub: Hub, dump: Path) -> None:
    hub.meanwhile["run.json"] = b"{}"
    with pytest.raises(TemporaryError, match="run the same command again"):
        exchange.push(dump, URL)
    with pytest.raises(MismatchError, match="holds another dump"):
        exchange.push(dump, URL)
    assert hub.files("me/dump")["run.json"] == b"{}"


def test_a_push_ends_well_only_if_all_is_there(hub: Hub, dump: Path) -> None:
    hub.lose.add("tokenizer/tokenizer.json")
    with pytest.raises(TemporaryError, match=r"tokenizer.json missing or different"):
        exchange.push(dump, URL)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (HTTPX.ConnectError("refused"), TemporaryError),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), MismatchError),
        (RuntimeError("one of several"), TemporaryError),
        # What a download that does not reach the hub ends as is a FileNotFoundError.
        (huggingface_hub.errors.LocalEntryNotFoundError("not here"), TemporaryError),
        (FileNotFoundError("no such file"), FileNotFoundError),
        (KeyError("a bug"), KeyError),
    ],
)
def test_errors_of_the_hub_are_told_by_what_can_mend(error: Exception, told: type[Exception]) -> None:
    if isinstance(error, RuntimeError | huggingface_hub.errors.LocalEntryNotFoundError):
        error.__cause__ = HTTPX.ReadTimeout("slow")
    with pytest.raises(told), asking(URL):
        raise error


def test_what_is_damaged_is_neither_pushed_nor_pulled(hub: Hub, dump: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(dump, bad)
    shard = next((bad / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    make_dump(tmp_path / "open", seal=False)
    for source in (bad, tmp_path / "open"):
        with pytest.raises(DataError, match="damaged or not sealed"):
            exchange.push(source, URL)
    assert not hub.repositories
    exchange.push(dump, URL)
    hub.damage.add(next(name for name in hub.files("me/dump") if name.startswith("data/")))
    with pytest.raises(DataError, match="different"):
        exchange.pull(URL, tmp_path / "pulled")


def test_a_model_there_and_back(hub: Hub, tmp_path: Path, call: Call) -> None:
    model, url = tmp_path / "final", "hf://me/adapter"
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("not the hub's")
    save_file({"w": np.ones(3, np.float32)}, model / "adapter_model.safetensors")
    assert call("push", str(model), url, "--private")[0] == 0
    assert hub.repositories["models", "me/adapter"].private
    assert call("pull", url, str(tmp_path / "back"))[0] == 0
    shutil.rmtree(model / ".git")
    assert contents(tmp_path / "back") == contents(model)
    save_file({"w": np.zeros(3, np.float32)}, model / "adapter_model.safetensors")
    code, _, err = call("push", str(model), url)
    assert (code, "--replace" in err) == (Exit.MISMATCH, True)
    # Nor may other weights stay beside these: they might be loaded in their place.
    (model / "adapter_model.safetensors").rename(model / "model.safetensors")
    (model / "adapter_config.json").rename(model / "config.json")
    code, _, err = call("push", str(model), url)
    assert (code, "adapter_model.safetensors" in err) == (Exit.MISMATCH, True)
    assert call("push", str(model), url, "--replace")[0] == 0
    kept = {"model.safetensors", "config.json"}
    assert set(hub.files("me/adapter", "models")) - {".gitattributes"} == kept
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    (model / "config.json").rename(model / "adapter_config.json")
    # What lies there is not written over either.
    assert call("push", str(model), url, "--replace")[0] == 0
    code, _, err = call("pull", url, str(tmp_path / "back"))
    assert (code, "holds something else" in err) == (Exit.MISMATCH, True)


def test_another_model_does_not_get_the_card_of_the_one_that_it_replaces(hub: Hub, tmp_path: Path, call: Call) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"w": np.ones(3, np.float32)}, model / "model.safetensors")
    files = {"config.json": b'{"other": 1}', "README.md": b"of the other one"}
    hub.repositories["models", "me/model"] = Repository([files])
    assert call("push", model, "hf://me/model")[0] == Exit.MISMATCH
    assert call("push", model, "hf://me/model", "--replace")[0] == 0
    assert set(hub.files("me/model", "models")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("push", "DUMP", "hf://me/dump"), Exit.USAGE, "no place for a dump"),
        (("push", "DUMP", "s3://bucket/x"), Exit.USAGE, "hf://datasets/USER/NAME"),
        (("push", "DUMP", "hf://datasets/me/dump@v1"), Exit.USAGE, "no place for a dump"),
        (("push", "nowhere", "hf://me/model"), Exit.USAGE, "neither a dump nor a model"),
        (("push", "nowhere", "hf://datasets/me/dump"), Exit.USAGE, "nowhere is neither a dump nor a model"),
        (("push", "s3://bucket/x", "hf://datasets/me/dump"), Exit.USAGE, "copy a dump of an object store here first"),
        (("pull", "hf://datasets/me/nothing", "out"), Exit.MISMATCH, "not there, or not for you"),
        (("verify", "hf://datasets/me/nothing"), Exit.MISMATCH, "not there, or not for you"),
        (("verify", "hf://me/model"), Exit.MISMATCH, "hf://datasets/USER/NAME"),
    ],
)
def test_refusals(
    hub: Hub, dump: Path, call: Call, arguments: tuple[str, ...], code: int, says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    got, _, err = call(*({"DUMP": str(dump)}.get(word, word) for word in arguments))
    assert (got, says in err, TOKEN in err) == (code, True, False), err
    assert not list(tmp_path.iterdir())


def test_without_a_token_nothing_is_pushed(hub: Hub, dump: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrongcanary" * 4)
    with pytest.raises(MismatchError, match="hf auth login") as refused:
        exchange.push(dump, URL)
    assert "canary" not in str(refused.value)
    with pytest.raises(UsageError, match="is no repository of the hub"):
        exchange.pull("hf://spaces/me/x", dump.parent / "x")
