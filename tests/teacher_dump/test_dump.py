"""Stage one end to end on a tiny teacher: what is stored, what a rerun does, and how work is shared and lost."""

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from support.dump_checks import (
    SAMPLES,
    UNITS,
    assert_each_sample_once,
    files_of,
    rows_of,
    sections,
)
from support.rounding import LOGPROB
from support.tiny_teachers import VOCABULARY, save_teacher, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from storage_schemas.targets import Decoded, Targets, decode
from storage_schemas.verify import verify
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import run_dump, tokenizer_files
from teacher_dump.recompute import recompute_rows
from teacher_dump.teachers.teacher import PendingTargets, Teacher


def exact_logprobs(model: Any, row: Row) -> np.ndarray:
    """(supervised tokens, V) float64 log-softmax of the logits one position before each supervised token."""
    with torch.no_grad():
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
    tokens = np.flatnonzero(row.loss_mask)
    return torch.log_softmax(logits[tokens - 1], dim=1).numpy()


def test_stored_targets_are_the_log_softmax_one_position_earlier(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    run_dump(
        **sections(tmp_path, corpus_file, model_folder, logprob_step=0.0) | {"estimator": TopK(k=VOCABULARY, mass=1.0)},
        temperatures=(1.0, 2.0),
    )
    model = tiny_model("llama")
    supervised = 0
    for row in rows_of(tmp_path):
        if row.status != "ok":
            assert row.targets is None
            continue
        exact = exact_logprobs(model, row)
        supervised += len(exact)
        np.testing.assert_array_equal(
            row.targets.ids.reshape(exact.shape), np.tile(np.arange(VOCABULARY), (len(exact), 1))
        )
        np.testing.assert_allclose(row.targets.logprobs.reshape(exact.shape), exact, atol=LOGPROB)
        assert np.isneginf(row.targets.tail_logprob).all()
    assert supervised > 50


@pytest.mark.parametrize(
    "estimator",
    [TopK(k=12), Adaptive(kind="adaptive", mass=0.8, k_max=8, tail_draws=4), Sampled(kind="sampled", draws=20)],
)
def test_rounded_targets_stay_within_the_gate(
    tmp_path: Path, corpus_file: Path, model_folder: Path, estimator: Estimator
) -> None:
    temperatures = (1.0, 2.0) if estimator.kind == "topk" else (1.0,)
    run_dump(**sections(tmp_path, corpus_file, model_folder) | {"estimator": estimator}, temperatures=temperatures)
    model = tiny_model("llama")
    for i, temperature in enumerate(temperatures):
        total, tokens = 0.0, 0
        for row in rows_of(tmp_path):
            if row.status != "ok":
                continue
            exact = exact_logprobs(model, row)
            tempered = torch.log_softmax(torch.from_numpy(exact) / temperature, dim=1).numpy()
            stored = decode(row.targets, temperature_index=i, temperature=temperature)
            assert_true_entries(stored, tempered)
            total += bucketed_kl(stored, tempered)
            tokens += len(exact)
        assert -1e-6 < total / tokens < 1.2e-4


def assert_true_entries(stored: Decoded, exact: np.ndarray) -> None:
    """Each stored log-prob is the teacher's, up to the rounding grid."""
    filled = stored.weights > 0
    there = np.take_along_axis(exact, stored.ids.astype(np.int64), 1)
    np.testing.assert_allclose(stored.logprobs[filled], there[filled], atol=0.08)


def bucketed_kl(stored: Decoded, exact: np.ndarray) -> float:
    """Sum over tokens of KL(exact || stored) on the head and one bucket for the rest."""
    there = np.take_along_axis(exact, stored.ids.astype(np.int64), 1)
    p = np.where(stored.in_head, np.exp(there), 0.0)
    head = (p * np.where(stored.in_head, there - stored.logprobs, 0.0)).sum()
    rest = 1.0 - p.sum(1)
    visible = (rest > 1e-9) & np.isfinite(stored.tail_logprob)
    return float(head + (rest[visible] * (np.log(rest[visible]) - stored.tail_logprob[visible])).sum())


def test_every_sample_has_one_row_and_the_summary_counts_them(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    summary = run_dump(**sections(tmp_path, corpus_file, model_folder))
    rows = rows_of(tmp_path)
    assert_each_sample_once(tmp_path)
    assert [row.sample_id for row in rows] == [f"s{i}" for i in range(SAMPLES)]
    assert rows[5].status == "empty"
    assert rows[7].status == "too_long"
    assert summary.statuses == {"empty": 1, "ok": 9, "too_long": 1}
    assert summary.rows == SAMPLES
    assert (summary.units, summary.units_done_here) == (UNITS, UNITS)
    assert summary.supervised_tokens == sum(int(row.loss_mask.sum()) for row in rows if row.status == "ok")
    assert summary.tokens == sum(len(row.input_ids) for row in rows)
    assert summary.tokens_here == sum(len(row.input_ids) for row in rows if row.status == "ok")
    assert summary.truncated == 0
    job = sections(tmp_path / "cut", corpus_file, model_folder)
    cut = run_dump(**job | {"corpus": job["corpus"].model_copy(update={"too_long": "truncate"})})
    assert (cut.truncated, cut.statuses) == (1, {"empty": 1, "ok": 10})
    assert summary.bytes == sum(path.stat().st_size for path in tmp_path.glob("data/*"))
    assert summary.fingerprint == Dump.open(str(tmp_path)).provenance.fingerprint
    assert summary.tokens_per_second > 0
    assert 0 < summary.mean_kept_mass < 1


def test_the_tokenizer_in_the_dump_is_the_teachers(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    run_dump(**sections(tmp_path / "dump", corpus_file, model_folder))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in Dump.open(str(tmp_path / "dump")).read_tokenizer().items():
        (folder / name).write_bytes(content)
    found = AutoTokenizer.from_pretrained(folder)
    assert found.get_vocab() == tiny_tokenizer().get_vocab()
    assert found.chat_template == tiny_tokenizer().chat_template


def test_a_rerun_does_nothing_and_loads_no_weights(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    first = run_dump(**sections(tmp_path, corpus_file, model_folder))
    before = files_of(tmp_path)
    teacher = Teacher(sections(tmp_path, corpus_file, model_folder)["teacher"])
    again = run_dump(**sections(tmp_path, corpus_file, model_folder, batch_tokens=50) | {"teacher": teacher})
    assert files_of(tmp_path) == before
    assert "model" not in vars(teacher), "the weights were loaded"
    assert (again.units_done_here, again.tokens_here, again.tokens_per_second) == (0, 0, None)
    assert again.rows == first.rows
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"estimator": TopK(k=9)}, "estimator.k"),
        ({"temperatures": (1.0, 3.0)}, "temperatures"),
        ({"corpus": "other"}, "corpus.fingerprint"),
        ({"teacher": "other"}, "teacher.weights_sha256"),
    ],
)
def test_other_settings_are_refused_before_the_weights_are_loaded(
    tmp_path: Path, corpus_file: Path, model_folder: Path, change: dict[str, Any], field: str
) -> None:
    url = tmp_path / "dump"
    run_dump(**sections(url, corpus_file, model_folder))
    before = files_of(url)
    wanted = sections(url, corpus_file, model_folder) | change
    if change.get("corpus"):
        path = tmp_path / "other.jsonl"
        path.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[::-1]))
        wanted["corpus"] = CorpusSection(sources=[SourceSection(path=str(path))], max_length=96, too_long="drop")
    folder = save_teacher(tmp_path / "teacher", seed=1) if change.get("teacher") else model_folder
    section = TeacherSection(model=str(folder), dtype="float32", device="cpu")
    teacher = wanted["teacher"] = Teacher(section)
    with pytest.raises(MismatchError, match=field.replace(".", r"\.")):
        run_dump(**wanted)
    assert "model" not in vars(teacher), "the weights were loaded"
    assert files_of(url) == before


def test_a_copy_of_the_teacher_continues_a_dump_with_other_versions(
    tmp_path: Path, corpus_file: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mount, another release of a library: its tokenizer files and config.json may be other bytes, too."""
    url = str(tmp_path / "dump")
    first = run_dump(**sections(url, corpus_file, model_folder))
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"written_by_a_later_version": True}))
    monkeypatch.setattr("teacher_dump.teachers.teacher.version", lambda name: "9.9")
    (tmp_path / "dump" / "SEALED.json").unlink()
    for path in [*(tmp_path / "dump").glob("commits/*1.json"), *(tmp_path / "dump").glob("data/unit-*1-*")]:
        path.unlink()
    again = run_dump(**sections(url, corpus_file, copy))
    assert again.units_done_here > 0
    assert again.fingerprint == first.fingerprint
    assert verify(url).ok
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.3}))
    with pytest.raises(MismatchError, match=r"teacher\.config_sha256"):
        run_dump(**sections(url, corpus_file, copy))


def test_one_teacher_serves_several_dumps(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    other = tmp_path / "heldout.jsonl"
    other.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:4]))
    teacher = Teacher(sections(tmp_path, corpus_file, model_folder)["teacher"])
    run_dump(**sections(tmp_path / "a", corpus_file, model_folder) | {"teacher": teacher})
    model = teacher.model
    run_dump(**sections(tmp_path / "b", other, model_folder) | {"teacher": teacher})
    assert teacher.model is model
    for a, b in zip(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"), strict=False):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        if a.targets is not None:
            np.testing.assert_array_equal(a.targets.ids, b.targets.ids)


@pytest.mark.parametrize("estimator", [TopK(k=8), Adaptive(kind="adaptive", mass=0.6, k_max=4)])
def test_targets_do_not_depend_on_the_batches(
    tmp_path: Path, corpus_file: Path, model_folder: Path, estimator: Estimator
) -> None:
    """Entries are equal; log-probs differ by float32 rounding of other matrix shapes, see `support.rounding`."""
    for tokens in (1, 64, 10_000):
        job = sections(tmp_path / str(tokens), corpus_file, model_folder, batch_tokens=tokens, logprob_step=0.0)
        run_dump(**job | {"estimator": estimator})
    alone, *others = (rows_of(tmp_path / str(tokens)) for tokens in (1, 64, 10_000))
    for rows in others:
        for a, b in zip(alone, rows, strict=True):
            if a.targets is not None:
                np.testing.assert_array_equal(a.targets.ids, b.targets.ids)
                np.testing.assert_allclose(a.targets.logprobs, b.targets.logprobs, atol=LOGPROB)
                np.testing.assert_allclose(a.targets.tail_logprob, b.targets.tail_logprob, atol=LOGPROB)


PADDED = VOCABULARY + 64


@pytest.mark.parametrize(
    "estimator",
    [TopK(k=VOCABULARY, mass=1.0), Adaptive(kind="adaptive", mass=0.3, k_max=4), Sampled(kind="sampled", draws=200)],
)
def test_ids_that_the_tokenizer_lacks_have_no_probability(
    tmp_path: Path, corpus_file: Path, estimator: Estimator
) -> None:
    """Many heads are padded; a student with a smaller one stops at such an id in mid-run."""
    folder = save_teacher(tmp_path / "teacher", vocab_size=PADDED)
    section = sections(tmp_path / "dump", corpus_file, folder, logprob_step=0.0) | {"estimator": estimator}
    run_dump(**section)
    dump = Dump.open(str(tmp_path / "dump"))
    assert (dump.provenance.masked_from, dump.provenance.teacher.lm_head_rows) == (VOCABULARY, PADDED)
    assert max(record.max_id for record in dump.read_records().values()) < VOCABULARY
    model = tiny_model("llama", vocab_size=PADDED)
    for row in rows_of(tmp_path / "dump"):
        if row.targets is not None:
            every = exact_logprobs(model, row)[:, :VOCABULARY]
            assert np.exp(every).sum(1).max() < 0.95, "the padded rows of this model have no weight to lose"
            exact = every - np.logaddexp.reduce(every, axis=1, keepdims=True)
            tokens = np.repeat(np.arange(len(exact)), row.targets.lengths)
            np.testing.assert_allclose(row.targets.logprobs, exact[tokens, row.targets.ids], atol=LOGPROB)
    report = recompute_rows(dump, Teacher(section["teacher"]), rows=SAMPLES)
    assert report.errors == []


def test_heads_wider_than_the_vocabulary_are_refused_before_anything_is_read(
    tmp_path: Path, model_folder: Path
) -> None:
    for estimator in (TopK(k=VOCABULARY + 1), Adaptive(kind="adaptive", k_max=1_000_000)):
        section = sections(tmp_path / "dump", tmp_path / "no-such-file", model_folder) | {"estimator": estimator}
        with pytest.raises(MismatchError, match=rf"more entries(.|\n)*at most {VOCABULARY}"):
            run_dump(**section)
    assert not (tmp_path / "dump").exists()


def test_a_teacher_that_gives_only_nan_makes_no_dump(tmp_path: Path, corpus_file: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(DataError, match="not finite") as caught:
        run_dump(**sections(tmp_path / "dump", corpus_file, folder))
    assert "of unit 0" in str(caught.value)
    assert not (tmp_path / "dump" / "commits").exists()
    assert not (tmp_path / "dump" / "SEALED.json").exists()


def test_a_torn_teacher_leaves_no_mark_on_the_dump(tmp_path: Path, corpus_file: Path) -> None:
    """The repaired one is not another teacher: run.json is written once the weights have loaded."""
    folder = save_teacher(tmp_path / "teacher")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors is torn"):
        run_dump(**sections(tmp_path / "dump", corpus_file, folder))
    assert not (tmp_path / "dump").exists()
    weights.write_bytes(whole)
    assert run_dump(**sections(tmp_path / "dump", corpus_file, folder)).units == UNITS


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model": "nowhere/at/all"}, MismatchError, "is no directory"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack"}},
            MismatchError,
            "compressed",
        ),
        ({"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}, MismatchError, "causal"),
        ({"weight_map": {"lm_head.weight": "../other.safetensors"}}, DataError, "outside of the model"),
    ],
)
def test_a_teacher_that_cannot_be_run_is_refused_before_the_corpus_is_read(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus is a file that is not there, which nobody gets to see."""
    folder = save_teacher(tmp_path / "teacher")
    if "weight_map" in change:
        (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    elif "model" not in change:
        config = json.loads((folder / "config.json").read_text())
        if "auto_map" in change:
            (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
            config["model_type"] = "evil"
        (folder / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    job = sections(tmp_path / "dump", tmp_path / "no-corpus.jsonl", folder)
    if "model" in change:
        job["teacher"] = job["teacher"].model_copy(update=change)
    with pytest.raises(error, match=words):
        run_dump(**job)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "dump").exists()


def test_a_sample_with_nonfinite_logits_is_a_row_without_targets(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    section = sections(tmp_path, corpus_file, model_folder)["corpus"]
    corpus = freeze_corpus(section, tokenizer, lm_head_rows=VOCABULARY)
    used = [set(corpus.sample(i).input_ids.tolist()) for i in range(SAMPLES)]
    poisoned = next(token for token in range(VOCABULARY) if 2 <= sum(token in ids for ids in used) <= 5)
    with torch.no_grad():
        model.get_input_embeddings().weight[poisoned] = float("inf")
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    summary = run_dump(**sections(tmp_path / "dump", corpus_file, folder))
    for row in rows_of(tmp_path / "dump"):
        seen = row.input_ids[: np.flatnonzero(row.loss_mask).max(initial=0)]
        if row.status in ("ok", "nonfinite"):
            assert (row.status == "nonfinite") == (poisoned in seen)
    assert summary.statuses["nonfinite"] > 0
    assert summary.statuses["ok"] > 0
    assert_each_sample_once(tmp_path / "dump")


def test_the_next_batch_runs_while_targets_of_one_are_waited_for(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    launched: list[threading.Event] = []

    class Following(Teacher):
        """Targets come when the batch after them has been sent through the model."""

        def batches(self, samples: Sequence[Row]) -> list[list[Row]]:
            batches = super().batches(samples)
            launched[:] = [threading.Event() for _ in batches]
            self.place = 0
            return batches

        def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
            pending, following = super().launch(samples, recipe), launched[self.place + 1 : self.place + 2]
            launched[self.place].set()
            self.place += 1

            def targets() -> list[Targets | None]:
                assert all(event.wait(20) for event in following), "nobody went on"
                return pending()

            return targets

    job = sections(tmp_path, corpus_file, model_folder, batch_tokens=1)
    run_dump(**job | {"teacher": Following(job["teacher"])})
    assert_each_sample_once(tmp_path)


def test_targets_that_cannot_be_had_end_the_dump(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    class Failing(Teacher):
        def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
            def targets() -> None:
                raise RuntimeError("the device is gone")

            return targets

    job = sections(tmp_path, corpus_file, model_folder)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run_dump(**job | {"teacher": Failing(job["teacher"])})
    assert not list(tmp_path.glob("commits/*"))


@pytest.mark.parametrize(("action", "error"), [("thread", RuntimeError), ("full", TemporaryError)])
def test_a_dead_writer_stops_the_worker_at_once(
    tmp_path: Path,
    corpus_file: Path,
    model_folder: Path,
    action: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Watching(Teacher):
        """One sample per call; after the first unit, it waits for the writer's death and goes on."""

        def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
            asked.append(len(samples))
            deadline = time.monotonic() + 20
            while len(asked) > 5 and any(thread.name == "commits" for thread in threading.enumerate()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return super().launch(samples, recipe)

    job = sections(tmp_path, corpus_file, model_folder, samples_per_unit=5, batch_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_passed", {})
        patch.setenv("LLM_NEO_FAULT", f"put:data:before:1:{action}")
        with pytest.raises(error, match=r"injected|cannot write"):
            run_dump(**job | {"teacher": Watching(job["teacher"])})
    # The writer may die before the sixth call, or while it waits.
    assert asked in ([1] * 5, [1] * 6), "the worker asked for more after its writer had died"
    run_dump(**job)
    assert [row.sample_index for row in rows_of(tmp_path)] == list(range(SAMPLES))


def test_progress_is_a_line_or_a_bar_and_events_are_json(
    tmp_path: Path,
    corpus_file: Path,
    model_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teacher_dump.progress._LINE_SECONDS", 0.0)
    monkeypatch.setattr("teacher_dump.progress._BAR_SECONDS", 0.0)
    job = sections(tmp_path / "a", corpus_file, model_folder)
    with caplog.at_level(logging.INFO, logger="teacher_dump"):
        run_dump(**job, events=tmp_path / "log" / "events.jsonl", console=Console(file=StringIO()))
    line = caplog.messages[-1]
    for part in (f"{UNITS}/{UNITS} units", "tokens/s", "left", "bytes/supervised token", "coverage"):
        assert part in line
    events = [json.loads(line) for line in (tmp_path / "log" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in (events[0], events[-1])] == ["start", "end"]
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["tokens"] for event in progress] == sorted(event["tokens"] for event in progress)
    assert progress[-1]["units_done"] == progress[-1]["units"] == UNITS
    assert progress[-1]["eta_seconds"] == 0.0
    assert progress[-1]["bytes_per_supervised_token"] == pytest.approx(events[-1]["bytes_per_supervised_token"])

    screen, lines = StringIO(), len(caplog.messages)
    job = sections(tmp_path / "b", corpus_file, model_folder)
    run_dump(**job, console=Console(file=screen, force_terminal=True, width=160))
    assert f"{UNITS}/{UNITS}" in screen.getvalue()
    assert "tokens/s" in screen.getvalue()
    assert len(caplog.messages) == lines, "the bar and the lines were both shown"


def test_signal_handlers_are_put_back(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_dump(**sections(tmp_path, corpus_file, model_folder))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_how_the_tokenizer_was_loaded_is_not_part_of_it(tmp_path: Path) -> None:
    """Offline or not, with a copy on disk or from the hub: workers write the same files."""
    tokenizer = Teacher(TeacherSection(model=str(save_teacher(tmp_path / "teacher")))).tokenizer
    found = []
    for offline in (True, False):
        tokenizer.init_kwargs |= {"local_files_only": offline, "is_local": not offline}
        found.append(tokenizer_files(tokenizer))
    assert found[0] == found[1]
    (tmp_path / "again").mkdir()
    for name, content in found[0].items():
        (tmp_path / "again" / name).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


def test_held_out_samples_that_are_the_corpus_are_refused_before_anything_is_written(
    tmp_path: Path, corpus_file: Path, model_folder: Path
) -> None:
    job = sections(tmp_path / "dump", corpus_file, model_folder)
    part = job["corpus"].sources[0].model_copy(update={"split": "train[:50%]"})
    for corpus in (job["corpus"], job["corpus"].model_copy(update={"sources": [part]})):
        with pytest.raises(DataError, match="held-out samples are in the training corpus"):
            run_dump(**job | {"corpus": corpus}, apart_from=job["corpus"])
    assert not (tmp_path / "dump").exists()
