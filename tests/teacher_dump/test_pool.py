"""Tokenising in several processes: the same corpus, errors that are the parent's, and nothing left running."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.corpora import freeze, statuses_of, write_jsonl
from support.pool_jobs import killed, slow
from support.tiny_teachers import CHATML, HEADERS, tiny_tokenizer

from storage_schemas.common.errors import DataError, TemporaryError
from teacher_dump.corpus import freeze as corpus_module
from teacher_dump.corpus.pool import pooled

pytestmark = pytest.mark.usefixtures("own_cache")

TESTS = Path(__file__).parents[1]


def write(path: Path, count: int) -> list[dict]:
    records = [
        {"messages": [{"role": "user", "content": f"what {i}"}, {"role": "assistant", "content": "so " * (i % 17)}]}
        for i in range(count)
    ]
    records[count // 2] = {"id": "half", "messages": [{"role": "user", "content": "\ud800"}]}
    write_jsonl(path, records)
    return records


@pytest.mark.parametrize("template", [CHATML, HEADERS])
def test_the_corpus_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    write(tmp_path / "a.jsonl", 150)
    alone = freeze(tmp_path / "a.jsonl", num_proc=1, tokenizer=tiny_tokenizer(template), max_length=40)
    monkeypatch.setattr(corpus_module, "_BATCH", 7)
    several = freeze(tmp_path / "a.jsonl", num_proc=2, tokenizer=tiny_tokenizer(template), max_length=40)
    assert several.fingerprint == alone.fingerprint
    assert (several.problems, statuses_of(several)) == (alone.problems, statuses_of(alone))
    assert several.lengths.tolist() == alone.lengths.tolist()
    assert several.problems[0][0].startswith(str(tmp_path / "a.jsonl"))


def test_what_a_process_raises_is_the_error_of_the_command(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 40)
    with pytest.raises(DataError, match=r"record \d+: the sample is too long(.|\n)*corpus\.max_length"):
        freeze(tmp_path / "a.jsonl", num_proc=2, max_length=30, too_long="error")
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_is_an_error_and_not_a_wait() -> None:
    with pytest.raises(TemporaryError, match=r"was killed(.|\n)*num_proc"), pooled(killed, processes=2) as mapped:
        list(mapped(range(100)))


def test_leaving_ends_what_is_running() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Libraries that other tests use may set another.

    def work() -> None:
        with pooled(slow, processes=2) as mapped:
            for _ in mapped(range(10)):
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
                break
            list(mapped(range(10)))

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "from support.pool_jobs import slow; from teacher_dump.corpus.pool import pooled\nif __name__ == '__main__':\n"
    )
    code += " with pooled(slow, processes=2) as mapped:\n  r = mapped(range(9)); print(next(r), flush=True); list(r)\n"
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"0\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) >= 2
        parent.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < deadline, "they are still there"
        time.sleep(0.05)
