"""The vLLM backend without vLLM: what it refuses and when, the check against transformers, and whole dumps in which
transformers answers in vLLM's place. `test_vllm_engine.py` runs the real engine."""

import importlib.util
import json
import logging
import time
from concurrent.futures import Future
from multiprocessing import get_context
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
import torch
from support.dump_checks import SAMPLES, assert_each_sample_once, rows_of, sections, vllm_sections
from support.rounding import LOGPROB
from support.tiny_teachers import VOCABULARY, sample_of, tiny_model, tiny_tokenizer
from test_vllm_logprobs import Flat

from pipeline.cli import main
from storage_schemas.common.errors import MismatchError
from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.targets import Targets
from teacher_dump.compare import TOLERANCES, compare
from teacher_dump.config import TeacherSection
from teacher_dump.corpus.freeze import freeze_corpus
from teacher_dump.dump import run_dump
from teacher_dump.teachers import vllm as vllm_backend
from teacher_dump.teachers.teacher import Teacher
from teacher_dump.teachers.vllm import VllmTeacher, check_samples

LIMIT = {"max_model_len": 96}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM 0.32.0 were there."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "vllm" else found(name))
    monkeypatch.setattr(vllm_backend, "_vllm_version", lambda: "0.32.0")


class StandIn(VllmTeacher):
    """Asks a model of transformers, one prompt at a time, and answers in vLLM's flat form."""

    seed = 0
    asked = 0

    def _open(self, k: int, tokens: int) -> None:
        self.engine_limits = (k, tokens)

    def _ask(self, prompts: list[list[int]], k: int) -> list[Flat]:
        model = tiny_model("llama", seed=self.seed)
        self.asked += len(prompts)
        return [flat_answer(model, prompt, k) for prompt in prompts]


def flat_answer(model: Any, prompt: list[int], k: int) -> Flat:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0].float()
    logprobs = torch.log_softmax(logits, 1)[:-1]
    own = torch.tensor(prompt[1:])[:, None]
    own_rank = (logprobs >= logprobs.gather(1, own)).sum(1, keepdim=True)
    top, ids = logprobs.topk(k)
    ranks = torch.arange(1, k + 1).expand_as(ids)
    bounds = np.arange(len(prompt)) * (k + 1)
    return Flat(
        start_indices=[0, *bounds[:-1].tolist()],
        end_indices=bounds.tolist(),
        token_ids=torch.cat([own, ids], 1).flatten().tolist(),
        logprobs=torch.cat([logprobs.gather(1, own), top], 1).flatten().tolist(),
        ranks=torch.cat([own_rank, ranks], 1).flatten().tolist(),
    )


def vllm_job(
    url: Path | str, corpus_file: Path, model_folder: Path, *, kind: Any = StandIn, **options: Any
) -> dict[str, Any]:
    job = vllm_sections(url, corpus_file, model_folder, **options)
    return job | {"teacher": kind(job["teacher"])}


def test_a_dump_through_vllms_answers_equals_that_of_transformers(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    job = vllm_job(tmp_path / "vllm", corpus_file, model_folder, vllm_check_samples=3)
    with caplog.at_level(logging.INFO, logger="teacher_dump"):
        run_dump(**job)
    assert any("vLLM agrees with transformers" in message for message in caplog.messages)
    assert job["teacher"].engine_limits == (8, 95)
    assert_each_sample_once(tmp_path / "vllm")
    plain = job["teacher"].section.model_copy(update={"backend": "transformers"})
    run_dump(**job | {"dump": job["dump"].model_copy(update={"url": str(tmp_path / "plain")}), "teacher": plain})
    tokens = 0
    for a, b in zip(rows_of(tmp_path / "vllm"), rows_of(tmp_path / "plain"), strict=True):
        assert (a.sample_id, a.status) == (b.sample_id, b.status)
        if b.targets is None:
            continue
        tokens += len(b.targets)
        np.testing.assert_array_equal(a.targets.head_size, b.targets.head_size)
        np.testing.assert_array_equal(a.targets.ids, b.targets.ids)
        np.testing.assert_allclose(a.targets.logprobs, b.targets.logprobs, atol=LOGPROB)
        np.testing.assert_allclose(np.exp(a.targets.tail_logprob), np.exp(b.targets.tail_logprob), atol=LOGPROB)
    assert tokens > 50
    assert job["teacher"].asked == 3 + 9


def test_a_teacher_of_several_dumps_is_compared_once(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None
) -> None:
    """The engine holds the memory by then, so that the model of the check would not fit beside it."""
    job = vllm_job(tmp_path / "a", corpus_file, model_folder, vllm_check_samples=3)
    run_dump(**job)
    run_dump(**job | {"dump": job["dump"].model_copy(update={"url": str(tmp_path / "b")})})
    assert job["teacher"].asked == 3 + 9 + 9


@pytest.mark.timeout(60)
def test_an_engine_that_is_killed_is_noticed(
    model_folder: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process stands for the engine: vLLM's own `generate` may wait for a killed one for ever."""
    monkeypatch.setattr(vllm_backend, "_LOOK_SECONDS", 0.05)
    teacher = VllmTeacher(TeacherSection(model=str(model_folder), backend="vllm"))
    engine = get_context("spawn").Process(target=time.sleep, args=(100,))
    engine.start()
    teacher._processes = {engine}
    answer: Future[str] = Future()
    Timer(0.3, answer.set_result, ["said"]).start()
    assert teacher._wait(answer) == "said"
    Timer(0.3, engine.kill).start()
    with pytest.raises(RuntimeError, match="gone"):
        teacher._wait(Future())
    engine.join()


def test_the_dump_says_vllm_and_takes_no_other_engine(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None
) -> None:
    job = vllm_job(tmp_path, corpus_file, model_folder)
    run_dump(**job)
    provenance = json.loads((tmp_path / "run.json").read_text())
    assert provenance["engine"] == {"name": "vllm", "arguments": {}}
    assert provenance["made_by"]["versions"]["vllm"] == "0.32.0"
    plain = job["teacher"].section.model_copy(update={"backend": "transformers"})
    with pytest.raises(MismatchError, match=r"engine\.name"):
        run_dump(**job | {"teacher": plain})
    quantised = vllm_job(tmp_path, corpus_file, model_folder, vllm={"quantization": "fp8"})
    with pytest.raises(MismatchError, match=r"engine\.arguments\.quantization = fp8"):
        run_dump(**quantised)
    elsewhere = vllm_job(tmp_path, corpus_file, model_folder, vllm={"tensor_parallel_size": 2})
    assert run_dump(**elsewhere).units_done_here == 0


def test_a_disagreement_stops_the_run_with_the_figures(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None
) -> None:
    class Other(StandIn):
        seed = 1

    job = vllm_job(tmp_path, corpus_file, model_folder, kind=Other)
    with pytest.raises(MismatchError, match=r"(?s)disagree.*tokens, mean KL \d.*at most 1e-06") as caught:
        run_dump(**job)
    assert caught.value.exit_code == 78
    assert not list(tmp_path.iterdir())


def test_the_model_that_vllm_is_compared_with_is_spread_over_all_devices(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM spreads does not fit into one of them."""
    placed = []

    class Watched(Teacher):
        def read_weights(self, **options: Any) -> Any:
            placed.append(options["device_map"])
            return super().read_weights(**options)

    monkeypatch.setattr(vllm_backend, "Teacher", Watched)
    section = TeacherSection(
        model=str(model_folder), dtype="float32", device="cpu", backend="vllm", vllm={"tensor_parallel_size": 8}
    )
    recipe = Recipe(estimator=TopK(k=5), temperatures=(1.0,), logsumexp=False)
    assert vllm_backend._reference(section, [sample_of(9)], recipe)[0] is not None
    assert placed == ["auto"]


def test_without_the_check_the_log_says_so(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(StandIn):
        seed = 1

    with caplog.at_level(logging.WARNING, logger="teacher_dump"):
        run_dump(**vllm_job(tmp_path, corpus_file, model_folder, kind=Other, vllm_check_samples=0))
    assert any("nobody compares" in message for message in caplog.messages)


def test_a_sample_without_numbers_is_a_row_without_targets(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None
) -> None:
    class Broken(StandIn):
        def _ask(self, prompts: list[list[int]], k: int) -> list[Flat]:
            answers = super()._ask(prompts, k)
            for prompt, answer in zip(prompts, answers, strict=True):
                if len(prompt) == self.broken:
                    answer.logprobs = [float("nan")] * len(answer.logprobs)
            return answers

    job = vllm_job(tmp_path / "a", corpus_file, model_folder, kind=Broken, vllm_check_samples=0)
    corpus = freeze_corpus(job["corpus"], tiny_tokenizer(), lm_head_rows=VOCABULARY)
    sample = corpus.sample(2)
    job["teacher"].broken = int(np.flatnonzero(sample.loss_mask)[-1]) + 1
    run_dump(**job)
    statuses = [row.status for row in rows_of(tmp_path / "a")]
    assert statuses[2] == "nonfinite"
    assert statuses.count("ok") > 4
    checked = vllm_job(tmp_path / "b", corpus_file, model_folder, kind=Broken, vllm_check_samples=SAMPLES)
    checked["teacher"].broken = job["teacher"].broken
    with pytest.raises(MismatchError, match=r"[1-9] of 9 samples without numbers"):
        run_dump(**checked)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"estimator": Adaptive(kind="adaptive")}, "estimator.kind = adaptive"),
        ({"estimator": Sampled(kind="sampled")}, "estimator.kind = sampled"),
        ({"temperatures": (1.0, 2.0)}, "temperatures = [1.0, 2.0]"),
        ({"logsumexp": True}, "dump.logsumexp = True"),
    ],
)
def test_what_vllm_cannot_make_is_refused_before_anything_is_written(
    tmp_path: Path, corpus_file: Path, model_folder: Path, installed: None, change: dict[str, Any], field: str
) -> None:
    job = vllm_job(tmp_path / "dump", corpus_file, model_folder)
    if change.pop("logsumexp", False):
        change["dump"] = job["dump"].model_copy(update={"logsumexp": True})
    with pytest.raises(MismatchError) as caught:
        run_dump(**job | change)
    assert field in str(caught.value)
    assert caught.value.exit_code == 78
    assert not (tmp_path / "dump").exists()
    assert job["teacher"].asked == 0


@pytest.mark.parametrize(("options", "limit"), [({}, 95), (LIMIT, 95), ({"max_model_len": 40}, 39)])
def test_a_sample_must_leave_a_place_for_the_generated_token(
    tmp_path: Path, model_folder: Path, installed: None, options: Any, limit: int
) -> None:
    corpus_file = tmp_path / "tokens.jsonl"
    for length in (limit, limit + 1):
        corpus_file.write_text(json.dumps({"input_ids": [5] * length, "loss_mask": [0] + [1] * (length - 1)}) + "\n")
        job = vllm_job(tmp_path / str(length), corpus_file, model_folder, vllm=options)
        job["corpus"] = job["corpus"].model_copy(update={"max_length": 96})
        if length == limit:
            assert run_dump(**job).supervised_tokens == limit - 1
        else:
            with pytest.raises(MismatchError, match=rf"at most {limit}: .*max_model_len"):
                run_dump(**job)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_command(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    section = TeacherSection(model=str(model_folder), backend="vllm")
    job = sections(tmp_path / "dump", corpus_file, model_folder, logsumexp=False) | {"teacher": section}
    with pytest.raises(MismatchError, match=r"pip install 'llm-neo\[vllm\]'") as caught:
        run_dump(**job)
    assert caught.value.exit_code == 78
    assert not (tmp_path / "dump").exists()


@pytest.mark.parametrize(
    ("teacher", "problem"),
    [
        ({"backend": "vllm", "vllm": {"max_logprobs": 5, "model": "x"}}, "max_logprobs (estimator.k sets it), model"),
        ({"backend": "vllm", "vllm": {"enable_prefix_caching": True}}, "cached tokens have no log-probs"),
        ({"backend": "vllm", "vllm": {"max_model_len": -1}}, "at least 2, but is -1"),
        ({"backend": "vllm", "vllm": {"max_model_len": "auto"}}, "at least 2, but is 'auto'"),
        ({"backend": "vllm", "vllm": {"tensor_parallel_size": "all"}}, "at least 1, but is 'all'"),
        ({"vllm": {"tensor_parallel_size": 2}}, "backend is transformers"),
        ({"backend": "vllm", "device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"backend": "vllm", "vllm_check_samples": -1}, "greater than or equal to 0"),
    ],
)
def test_engine_arguments_that_the_backend_owns_are_refused_by_name(teacher: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        TeacherSection(model="m", **teacher)
    assert problem in str(caught.value)


def test_the_command_line_lists_all_that_vllm_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"dump: {{url: {tmp_path}/dump}}\nteacher: {{model: m, backend: vllm}}\nestimator: {{kind: sampled}}\n"
        "temperatures: [1.0, 2.0]\ncorpus: {sources: [{path: a.jsonl}]}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["dump", str(config)])
    assert left.value.code == 78
    said = capsys.readouterr().err
    for field in ("estimator.kind", "temperatures", "dump.logsumexp"):
        assert field in said


def test_check_samples_run_from_the_shortest_to_the_longest(
    corpus_file: Path, model_folder: Path, tmp_path: Path
) -> None:
    section = sections(tmp_path, corpus_file, model_folder)["corpus"]
    corpus = freeze_corpus(section, tiny_tokenizer(), lm_head_rows=VOCABULARY)
    usable = sorted(len(corpus.sample(i).input_ids) for i in range(SAMPLES) if corpus.sample(i).status == "ok")
    for count in (0, 1, 2, 4, 9, 50):
        found = check_samples(corpus, count)
        assert len({sample.sample_index for sample in found}) == min(count, 9)
        assert all(sample.status == "ok" for sample in found)
        lengths = [len(sample.input_ids) for sample in found]
        assert lengths == sorted(lengths)
        assert lengths[:1] == usable[: min(count, 1)]
        if count > 1:
            assert lengths[-1] == usable[-1]


def targets_of(*tokens: dict[int, float], tail: float) -> Targets:
    """Each token is {id: probability}; `tail` is the mass of every one's rest."""
    return Targets(
        offsets=np.cumsum([0, *map(len, tokens)]),
        ids=np.array([id_ for token in tokens for id_ in sorted(token)], np.int32),
        logprobs=np.log([token[id_] for token in tokens for id_ in sorted(token)]).astype(np.float32),
        head_size=np.array([len(token) for token in tokens], np.int32),
        tail_logprob=np.full((len(tokens), 1), np.log(tail), np.float32),
    )


def test_agreement_is_the_bucketed_kl_over_common_entries() -> None:
    a = targets_of({1: 0.5, 2: 0.3}, {1: 0.5, 2: 0.3}, tail=0.2)
    b = targets_of({1: 0.4, 2: 0.3}, {1: 0.4, 3: 0.3}, tail=0.3)
    found = compare(a, b)
    first = 0.5 * np.log(0.5 / 0.4) + 0.2 * np.log(0.2 / 0.3)
    # The bucket holds what only one of them names: 0.3 + 0.2 against 0.3 + 0.3, all of its own.
    second = 0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.6)
    assert found.kl[:, 0] == pytest.approx([first, second], abs=1e-6)
    assert found.logprob == pytest.approx([np.log(0.5 / 0.4)] * 2, abs=1e-6)
    assert not found.within(TOLERANCES["bfloat16"])
    no_distribution = targets_of({1: 0.55, 2: 0.33}, {1: 0.55, 2: 0.33}, tail=0.2)
    assert not compare(a, no_distribution).within(TOLERANCES["float32"])
    same = compare(a, a)
    assert (same.kl.tolist(), same.gap.tolist()) == ([[0.0], [0.0]], [-np.inf, -np.inf])
    assert same.within(TOLERANCES["float32"])


@pytest.mark.parametrize(
    ("other", "gap", "fine"),
    [
        ({1: 0.5, 3: 0.2}, 0.0, True),  # A tie at the cut.
        ({1: 0.5}, np.log(0.2 / 0.5), True),  # Ends earlier.
        ({1: 0.5, 2: 0.2, 3: 0.2, 4: 0.05}, 0.0, True),  # Ends later.
        ({2: 0.2, 3: 0.2}, np.log(0.5 / 0.2), False),  # Lacks the largest.
    ],
)
def test_heads_agree_up_to_ties_and_where_they_end(other: dict[int, float], gap: float, fine: bool) -> None:
    a, b = targets_of({1: 0.5, 2: 0.2}, tail=0.3), targets_of(other, tail=1.0 - sum(other.values()))
    for found in (compare(a, b), compare(b, a)):
        assert found.gap[0] == pytest.approx(gap, abs=1e-6)
        assert (found.gap[0] <= TOLERANCES["float32"].logprob) == fine


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_figure_alone_can_stop_the_run(dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    same = compare(targets_of({1: 0.5}, tail=0.5), targets_of({1: 0.5}, tail=0.5))
    for name, most in (("kl", tolerance.kl), ("logprob", tolerance.logprob), ("gap", tolerance.logprob)):
        shape = getattr(same, name).shape
        assert same._replace(**{name: np.full(shape, most)}).within(tolerance)
        assert not same._replace(**{name: np.full(shape, 1.01 * most)}).within(tolerance)
        assert not same._replace(**{name: np.full(shape, np.nan)}).within(tolerance)
