"""The command line: instant help, documented exit codes, and what machines read."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.command_lines import Call
from support.dumps import some_provenance, unit_rows
from support.tiny_student import save_student
from support.tiny_teachers import save_teacher, tiny_tokenizer

from pipeline import cli, cli_options
from storage_schemas.common.errors import DataError, MismatchError, NothingToResumeError, TemporaryError, UsageError
from storage_schemas.common.exits import Exit
from storage_schemas.provenance import Provenance
from storage_schemas.writer import DumpWriter

COMMANDS = [
    "init",
    "dump",
    "freeze",
    "preview",
    "train",
    "run",
    "evaluate",
    "report",
    "chat",
    "merge",
    "plan",
    "verify",
    "inspect",
    "status",
    "doctor",
    "prune",
    "resize",
    "docs",
    "import",
    "export",
    "push",
    "pull",
    "config",
]


def write_dump(folder: Path, provenance: Provenance, *, seal: bool = True) -> Path:
    writer = DumpWriter.open(str(folder), provenance)
    tokenizer = folder.with_name("tokenizer")
    tiny_tokenizer().save_pretrained(tokenizer)
    writer.put_tokenizer({path.name: path.read_bytes() for path in tokenizer.iterdir()})
    for unit in range(provenance.units if seal else provenance.units - 1):
        writer.commit_unit(unit, unit_rows(provenance, unit))
    assert writer.seal() == seal
    return folder


def test_a_worker_under_a_launcher_sees_its_own_gpu(call: Call, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("CUDA_VISIBLE_DEVICES", "4,6")):
        monkeypatch.setenv(name, value)
    for device, visible in (("cuda:1", "4,6"), ("auto", "6")):
        sets = ("teacher.model=/nowhere", f"teacher.device={device}", "corpus={sources: [{path: x.jsonl}]}")
        assert call("dump", str(config), *(word for each in sets for word in ("--set", each)))[0] == Exit.MISMATCH
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dump(tmp_path_factory.mktemp("dumps") / "dump", some_provenance())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("dump: {url: nowhere}\n")
    return path


def test_no_help_imports_torch_or_takes_a_second() -> None:
    body = f"""
    import sys
    from pipeline.cli import app
    for arguments in [["--help"], *([name, "--help"] for name in {COMMANDS})]:
        try:
            app(arguments)
        except SystemExit as left:
            assert left.code == 0, (arguments, left.code)
    heavy = {{"torch", "transformers", "peft", "deepspeed", "datasets", "tokenizers", "accelerate"}} & set(sys.modules)
    assert not heavy, heavy
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", "\n".join(line[4:] for line in body.splitlines())], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    # Of the processor: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    before = after
    subprocess.run([sys.executable, "-m", "pipeline.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_lists_what_is_there_and_the_exit_codes(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    listed = [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2] not in " -"]
    assert listed == COMMANDS
    assert all(str(int(exit)) in out for exit in Exit)


def test_version(call: Call) -> None:
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("llm-neo ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dmp"],
        ["dump"],
        ["dump", "absent.yaml"],
        ["dump", "CONFIG", "--worker", "2"],
        ["dump", "CONFIG", "--workers", "0"],
        ["dump", "CONFIG", "--set", "nothing"],
        ["train", "CONFIG", "--nproc", "x"],
        ["evaluate", "--model", "m"],
        ["verify", "DUMP", "--store", "x"],
        ["plan", "CONFIG", "--pilot-samples", "0"],
        ["plan", "CONFIG", "--tokens-per-second", "0"],
        ["plan", "CONFIG", "--price-per-hour", "-1"],
        ["verify", "DUMP", "--recompute", "0"],
        ["inspect", "DUMP", "--row", "-1"],
        ["inspect", "DUMP", "--row", "10"],
        ["prune", "m"],
        ["resize", "m", "out"],
        ["import", "axolotl", "x", "y"],
        ["import", "other", "x", "y", "--teacher", "t"],
        ["import", "lists", "x", "y", "--teacher", "t"],
        ["import", "axolotl", "x", "y", "--teacher", "t", "--shift", "left"],
        ["import", "lists", "x", "y", "--teacher", ""],
        ["export", "axolotl", "DUMP", "out.json"],
    ],
)
def test_wrong_command_lines_exit_64(call: Call, config: Path, dump: Path, arguments: list[str]) -> None:
    code, out, err = call(*({"CONFIG": str(config), "DUMP": str(dump)}.get(word, word) for word in arguments))
    assert (code, out) == (Exit.USAGE, "")
    assert err
    assert "Traceback" not in err


def test_a_dump_goes_to_axolotl_and_comes_back(call: Call, dump: Path, tmp_path: Path) -> None:
    file, back, teacher = tmp_path / "x.parquet", tmp_path / "back", save_teacher(tmp_path / "teacher")
    code, out, err = call("export", "axolotl", str(dump), str(file), "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 8
    said = ["--teacher", str(teacher), "--shift", "next", "--tail", "lost", "--temperature", "1"]
    code, out, err = call("import", "axolotl", str(file), str(back), *said, "--json")
    assert code == 0, err
    assert json.loads(out)["statuses"] == {"ok": 8}
    assert call("verify", str(back))[0] == 0
    code, _, err = call("verify", str(back), "--recompute", "1")
    assert (code, "was imported (axolotl)" in err) == (Exit.MISMATCH, True)
    for url in ("s3:/bucket/x", "hf://datasets/me/x"):
        assert call("import", "axolotl", str(file), url, *said)[0] == Exit.MISMATCH
    code, _, err = call("import", "axolotl", str(file), str(tmp_path / "no"), "--teacher", str(tmp_path), *said[2:])
    assert (code, "correct --teacher" in err) == (Exit.MISMATCH, True)
    # The same columns by their names, without what the layout itself says.
    columns = ["--column", "ids=target_token_ids", "--column", "values=target_logprobs"]
    more = ["--values", "logprobs", "--mask", "labels"]
    code, out, err = call("import", "lists", str(file), str(tmp_path / "again"), *said, *columns, *more, "--json")
    assert (code, json.loads(out)["statuses"]) == (0, {"ok": 8}), err


def test_a_wrong_configuration_exits_78_with_all_its_problems(call: Call, config: Path) -> None:
    code, _, err = call("train", str(config), "--set", "train.outptu=x", "--set", "dump.urll=y")
    assert code == Exit.MISMATCH
    assert "3 problems" in err
    assert "did you mean train.output?" in err
    assert "did you mean dump.url?" in err


@pytest.mark.parametrize(
    ("command", "sections"),
    [
        ("dump", ["teacher", "corpus"]),
        ("plan", ["teacher", "corpus"]),
        ("train", ["train", "student"]),
        ("run", ["train", "student", "teacher"]),
    ],
)
def test_a_section_that_a_command_needs_is_asked_for(
    call: Call, config: Path, tmp_path: Path, command: str, sections: list[str]
) -> None:
    fields = {"teacher": "model: t", "corpus": "sources: [{path: c}]", "train": f"output: {tmp_path}/run"}
    for section in sections:
        code, _, err = call(command, str(config))
        assert code == Exit.MISMATCH
        assert f"`llm-neo {command}` needs the section `{section}`" in err
        config.write_text(config.read_text() + f"{section}: {{{fields.get(section, 'model: s')}}}\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("said"), 64),
        (DataError("said"), 65),
        (NothingToResumeError("said"), 66),
        (RuntimeError("said"), 70),
        (KeyboardInterrupt(), 75),
        (TemporaryError("said"), 75),
        (MismatchError("said"), 78),
    ],
)
def test_errors_become_exit_codes(
    call: Call, config: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_config", fail)
    got, out, err = call("train", str(config))
    assert (got, out) == (code, "")
    assert str(error) in err
    assert ("Traceback" in err) == (code == 70)
    assert ("this is a bug" in err) == (code == 70)


def test_a_schedulers_signal_exits_75(tmp_path: Path) -> None:
    """While nothing that knows better is running."""
    body = """
    import sys, time
    from pipeline import cli
    def hang(*_):
        print("ready", flush=True)
        time.sleep(60)
    cli.load_config = hang
    cli.main(["train", "x.yaml"])
    """
    code = "\n".join(line[4:] for line in body.splitlines())
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == Exit.TEMPORARY
    assert "run the same command again" in err


def test_verify_says_what_machines_and_people_need(call: Call, dump: Path) -> None:
    code, out, _ = call("verify", str(dump), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert (found["units"], found["rows"], found["errors"]) == (3, 10, [])
    assert found["supervised_tokens"] > 0
    assert found["bytes"] == sum(file.stat().st_size for file in (dump / "data").glob("*.parquet"))
    shown = call("verify", str(dump))[1]
    assert "intact" in shown
    assert f"3 units, 10 rows, {found['bytes']:,} bytes" in shown


def test_verify_of_damage_exits_65_and_names_it(call: Call, dump: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dump, tmp_path / "copy"))
    victim = sorted((copy / "data").glob("*.parquet"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    code, out, _ = call("verify", str(copy), "--json")
    assert code == Exit.BAD_DATA
    assert json.loads(out)["ok"] is False
    assert "unit 1" in json.loads(out)["errors"][0]
    code, out, _ = call("verify", str(copy))
    assert code == Exit.BAD_DATA
    assert "1 error" in out
    assert "unit 1" in out
    code, out, err = call("verify", str(tmp_path / "absent"), "--json")
    assert (code, out) == (Exit.BAD_DATA, "")
    assert "there is no dump" in err


def test_the_header_needs_no_data(call: Call, dump: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dump, tmp_path / "copy"))
    shutil.rmtree(copy / "data")
    code, out, _ = call("inspect", str(copy), "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["teacher"], found["estimator"], found["sealed"]) == ("teacher", "topk (k 8, mass 0.999)", True)
    assert (found["units"], found["committed"], found["rows"]) == (3, 3, 10)
    assert sum(found["statuses"].values()) == 10
    assert found["bytes_per_supervised_token"] == found["bytes"] / found["supervised_tokens"]
    assert found["tokenizer_ids"] == 100
    assert "sealed" in call("inspect", str(copy))[1]
    code, _, err = call("inspect", str(copy), "--row", "1")
    assert code == Exit.BAD_DATA
    assert "Traceback" not in err


def test_a_dump_in_progress_is_inspected_as_far_as_it_is(call: Call, tmp_path: Path) -> None:
    partial = write_dump(tmp_path / "partial", some_provenance(), seal=False)
    found = json.loads(call("inspect", str(partial), "--json")[1])
    assert (found["sealed"], found["committed"], found["units"], found["rows"]) == (False, 2, 3, 8)
    assert "2 of 3 units committed" in call("inspect", str(partial))[1]
    empty = tmp_path / "empty"
    DumpWriter.open(str(empty), some_provenance())
    found = json.loads(call("inspect", str(empty), "--json")[1])
    assert (found["committed"], found["bytes_per_supervised_token"]) == (0, None)
    assert call("inspect", str(empty))[0] == 0


@pytest.mark.parametrize("kind", ["topk", "adaptive", "sampled"])
def test_a_row_is_shown_token_by_token(call: Call, tmp_path: Path, kind: str) -> None:
    import numpy as np

    from storage_schemas.config import Adaptive, Sampled, TopK

    estimators: dict[str, Any] = {
        "topk": TopK(k=100, mass=1.0),
        "adaptive": Adaptive(kind="adaptive", k_max=4),
        "sampled": Sampled(kind="sampled", draws=20),
    }
    provenance = some_provenance(estimator=estimators[kind])
    folder = write_dump(tmp_path / "dump", provenance)
    row = unit_rows(provenance, 0)[2]
    code, out, _ = call("inspect", str(folder), "--row", "2", "--json")
    found = json.loads(out)["row"]
    assert code == 0
    assert (found["sample_index"], found["sample_id"], found["status"]) == (2, "sample-2", "ok")
    assert [token["position"] for token in found["supervised"]] == np.flatnonzero(row.loss_mask).tolist()
    assert row.targets is not None
    for i, token in enumerate(found["supervised"]):
        start, stop = row.targets.offsets[i : i + 2]
        ids, logp = row.targets.ids[start:stop].tolist(), row.targets.logprobs[start:stop]
        label = row.input_ids[token["position"]]
        assert len(token["top"]) == min(5, len(ids))
        assert token["top"] == sorted(token["top"], key=lambda pair: -pair[1])
        # Stored log-probs are rounded, to a sixteenth of a nat near 0 and more coarsely below.
        assert token["top"][0][1] == pytest.approx(np.exp(logp.max()), rel=0.07)
        if label in ids:
            place = ids.index(label)
            assert token["p"] == pytest.approx(np.exp(logp[place]), rel=0.3)
            higher, at_least = logp > logp[place] + 0.3, logp >= logp[place] - 0.3
            assert 1 + higher.sum() <= token["rank"] <= at_least.sum()
        else:
            assert token["rank"] is None
            assert token["p"] is None
    masses = [token["mass"] for token in found["supervised"]]
    assert masses == pytest.approx({"topk": [1.0] * len(masses), "sampled": [0.0] * len(masses)}.get(kind, masses))
    if kind == "topk":
        # Every id is stored: the entropy is that of the teacher.
        p = np.exp(row.targets.logprobs[: row.targets.offsets[1]].astype(np.float64))
        assert found["supervised"][0]["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=0.02)
    assert "sample-2" in call("inspect", str(folder), "--row", "2")[1]


def test_a_row_without_targets_says_why(call: Call, dump: Path) -> None:
    code, out, _ = call("inspect", str(dump), "--row", "5", "--json")
    assert code == 0
    assert json.loads(out)["row"]["status"] == "nonfinite"
    assert json.loads(out)["row"]["supervised"] == []


def test_prune_says_which_layers_stay(call: Call, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", num_hidden_layers=4)
    code, out, _ = call("prune", str(tmp_path / "teacher"), str(tmp_path / "student"), "--layers", "3")
    assert code == 0
    assert "3 of 4 layers kept: 0-1, 3; dropped: 2" in out
    assert (tmp_path / "student" / "tokenizer.json").is_file()
    code, _, err = call("prune", str(tmp_path / "teacher"), str(tmp_path / "student"), "--layers", "2")
    assert code == Exit.MISMATCH
    assert "another pruned model" in err


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--nonsense", 64)])
def test_what_libraries_do_at_the_interpreters_end_changes_no_exit_code(
    argument: str, code: int, tmp_path: Path
) -> None:
    """Their threads may abort the process there, when all is done; what is registered for the end happens before."""
    script = f"""
import atexit, os, sys
from pathlib import Path
from pipeline import entry
class Library:
    def __del__(self):
        os.abort()
library = Library()
atexit.register(Path({str(tmp_path / "told")!r}).touch)
sys.argv = ["llm-neo", {argument!r}]
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "told").exists()
    assert argument == "--nonsense" or done.stdout.startswith("llm-neo ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_quiet_from_the_first_moment(number: signal.Signals, tmp_path: Path) -> None:
    """While the interpreter itself starts, Python answers; from our first line on, we do."""
    script = """
import signal, sys
from pipeline import entry
found, before = [], signal.signal
def told(number, handler):
    found.append(before(number, handler))
    if len(found) == 2:
        print("up", flush=True)
signal.signal, sys.argv = told, ["llm-neo", "plan", "c.yaml"]
entry.main()
"""
    for delay in (0.1, 0.25, 0.5):
        job = subprocess.Popen(
            [sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        time.sleep(delay)
        job.send_signal(number)
        _, err = job.communicate(timeout=60)
        assert "Traceback" not in err
        if "c.yaml" not in err:  # Else it was faster, and had already said that there is no such file.
            assert job.returncode == 75
            assert err == "llm-neo: stopped\n"


def test_chat_answers_each_line_of_a_pipe(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a conversation that goes on, for each model apart; names head the replies of several."""
    model = save_student(tmp_path / "model")
    settings = ("--max-new-tokens", "3", "--device", "cpu")
    monkeypatch.setattr(sys, "stdin", io.StringIO("w9 w8\n\nw4\n"))
    code, out, err = call("chat", str(model), *settings)
    assert (code, len(out.splitlines())) == (0, 2)
    assert "has no chat template: text is continued as it is" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("w9 w8\n/new\nw9 w8\n/exit\nw4\n"))
    code, again, _ = call("chat", str(model), *settings, "--beside", str(model))
    first, *_ = out.splitlines()
    assert again.splitlines() == [f"--- {model}", first] * 4
    code, once, _ = call("chat", str(model), *settings, "--prompt", "w9 w8")
    assert (code, once) == (0, f"{first}\n")
    assert call("chat", str(tmp_path / "nowhere"))[0] == Exit.MISMATCH


def test_what_a_command_found_is_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"ok": True, "errors": [], "bytes": 12345, "share": 0.9468815487278982, "statuses": {"ok": 3}, "none": None}
    lines = dict(cli_options._plain(found | {"heldout": {"url": "h", "errors": ["a", "b"]}}))
    assert lines == {
        "ok": "true", "errors": "none", "bytes": "12,345", "share": "0.946882", "statuses.ok": "3", "none": "null",
        "heldout.url": "h", "heldout.errors": "b",
    }  # fmt: skip
    cli_options.print_result({"a": 1, "heldout": {"bytes_per_supervised_token": 2}}, False)
    assert len({line.index(value) for line, value in zip(capsys.readouterr().out.splitlines(), "12", strict=True)}) == 1
