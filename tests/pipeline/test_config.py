"""The configuration: every bound refuses, every problem is listed at once, overrides reach everywhere."""

import os
import time
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config import MAX_BYTES, Config, load_config, need
from pipeline.processes import stated
from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK

FULL = """
dump: {url: s3://bucket/run-a, samples_per_unit: 512}
teacher: {model: teacher, revision: null, dtype: bfloat16, backend: transformers, batch_tokens: 16384}
estimator: {kind: topk, k: 64, mass: 0.999}
temperatures: [1.0]
corpus: {sources: [{path: a.jsonl, format: auto}], max_length: 2048, mask: assistant, too_long: truncate}
heldout: {url: s3://bucket/run-a-heldout, sources: [{path: b.jsonl}]}
student: {model: student, lora: {r: 64, alpha: 128, dropout: 0.0, target_modules: all-linear, variant: lora}}
loss: {alpha: 0.5, divergence: forward_kl, temperature: 1.0}
train: {output: runs/a, arm: neo, zero_stage: 2, precision: bf16, global_batch_size: 32, micro_batch_size: 4,
        learning_rate: 2.0e-4, epochs: 1, max_steps: null, lr_scheduler_type: cosine, warmup_ratio: 0.1,
        save_steps: 100, resume: auto, seed: 0, report_to: []}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FULL)
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(MismatchError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_documented_names_are_read(file: Path) -> None:
    config = load_config(file)
    assert config.estimator == TopK(k=64, mass=0.999)
    assert config.train is not None
    assert config.train.output == Path("runs/a")
    assert config.train.learning_rate == 2e-4
    assert config.heldout is not None
    assert config.heldout.sources[0].path == "b.jsonl"


def test_a_dump_alone_is_a_configuration_and_other_sections_are_asked_for(file: Path) -> None:
    file.write_text("dump: {url: somewhere}")
    config = load_config(file)
    assert config.temperatures == (1.0,)
    assert config.estimator == TopK()
    with pytest.raises(MismatchError, match="`llm-neo train` needs the section `student`") as caught:
        need(config.student, "student", "train")
    assert "to do" in str(caught.value)


def test_the_resolved_configuration_reads_back_as_itself(file: Path) -> None:
    for overrides in ([], ["estimator.kind=sampled"], ["heldout=null"], ["train.report_to=[wandb]"]):
        config = load_config(file, overrides)
        file.write_text(config.to_yaml())
        assert load_config(file) == config
        file.write_text(FULL)


def test_every_problem_is_listed_where_it_stands_with_a_suggestion(file: Path) -> None:
    file.write_text(FULL.replace("samples_per_unit", "sample_per_unit").replace("arm: neo", "arm: noe"))
    message = problems(file, "train.zero_stage=7", "student.lora.rnk=8", "learning_rate=1")
    assert "5 problems" in message
    assert f"{file}: dump.sample_per_unit -> unknown key; did you mean dump.samples_per_unit?" in message
    assert f"{file}: train.arm -> must be 'full_sft', 'lora_sft', 'full_kd' or 'lora_kd', got 'noe'" in message
    assert "--set: train.zero_stage -> must be 0, 1, 2 or 3, got 7" in message
    assert "--set: student.lora.rnk -> unknown key; known here: r, alpha" in message
    assert "--set: learning_rate -> unknown key; did you mean train.learning_rate?" in message


def test_suggestions_of_an_estimator_come_from_the_chosen_kind(file: Path) -> None:
    message = problems(file, "estimator={kind: adaptive, kmax: 8}")
    assert "estimator.kmax -> unknown key; did you mean estimator.k_max?" in message
    assert "adaptive.kmax" not in message
    assert (
        "estimator.kind -> must be one of topk, adaptive, sampled, got 'adaptve'; did you mean adaptive?"
        in problems(file, "estimator.kind=adaptve")
    )


def test_list_elements_are_named_by_number(file: Path) -> None:
    message = problems(file, "corpus.sources=[{path: a, formt: auto}, {}]")
    assert "corpus.sources.0.formt -> unknown key; did you mean corpus.sources.0.format?" in message
    assert "corpus.sources.1.path -> missing, but required" in message


BOUNDS = [
    ("dump.url", None),
    ("dump.samples_per_unit", 0),
    ("dump.logprob_step", -0.1),
    ("dump.logprob_step", 1.1),
    ("dump.max_kl", 0),
    ("dump.storage_options", {"endpoint": []}),
    ("teacher.model", None),
    ("teacher.dtype", "int8"),
    ("teacher.backend", "llama.cpp"),
    ("teacher.batch_tokens", 0),
    ("estimator.k", 0),
    ("estimator.mass", 0),
    ("estimator.mass", 1.1),
    ("estimator", {"kind": "adaptive", "mass": 0}),
    ("estimator", {"kind": "adaptive", "k_min": 0}),
    ("estimator", {"kind": "adaptive", "k_max": 0}),
    ("estimator", {"kind": "adaptive", "k_min": 9, "k_max": 8}),
    ("estimator", {"kind": "adaptive", "tail_draws": 0}),
    ("estimator", {"kind": "sampled", "draws": 0}),
    ("estimator", "topk"),
    ("temperatures", []),
    ("temperatures", [1.0, 0]),
    ("temperatures", [1.0, -2.0]),
    ("temperatures", [1.0, 2.0, 2.0]),
    ("temperatures", [2.0]),
    ("temperatures", [1.0, float("inf")]),
    ("corpus.sources", []),
    ("corpus.sources.0.format", "csv"),
    ("corpus.max_length", 1),
    ("corpus.mask", "user"),
    ("corpus.too_long", "split"),
    ("heldout.url", "s3://bucket/run-a/"),
    ("student.model", None),
    ("student.lora.r", 0),
    ("student.lora.alpha", 0),
    ("student.lora.dropout", -0.1),
    ("student.lora.dropout", 1.0),
    ("student.lora.variant", "qlora"),
    ("loss.alpha", -0.1),
    ("loss.alpha", 1.1),
    ("loss.alpha", float("nan")),
    ("loss.divergence", "kl"),
    ("loss.temperature", 0),
    ("loss.temperature", 2.0),
    ("loss.beta", 0),
    ("loss.beta", 1),
    ("train.output", None),
    ("train.arm", "full"),
    ("train.zero_stage", 4),
    ("train.precision", "fp16"),
    ("train.global_batch_size", 0),
    ("train.micro_batch_size", 0),
    ("train.micro_batch_tokens", 0),
    ("train.learning_rate", 0),
    ("train.epochs", 0),
    ("train.max_steps", 0),
    ("train.lr_scheduler_type", "step"),
    ("train.warmup_ratio", -0.1),
    ("train.warmup_ratio", 1.1),
    ("train.weight_decay", -1),
    ("train.adam_beta1", 1.0),
    ("train.adam_beta1", -0.1),
    ("train.adam_beta2", 1.0),
    ("train.adam_epsilon", 0),
    ("train.max_grad_norm", -1),
    ("train.dumps", [{"url": "s3://bucket/run-a"}]),
    ("train.dumps", [{"url": "s3://bucket/run-a"}, {"url": "s3://bucket/run-a/"}]),
    ("train.dumps", [{"url": "s3://bucket/run-b"}, {"url": "s3://bucket/run-c"}]),
    ("train.dumps", [{"url": "s3://bucket/run-a"}, {"url": "s3://bucket/run-b", "weight": 0}]),
    ("train.dumps", [{"url": "s3://bucket/run-a"}, {"url": "s3://bucket/run-b", "weight": 1e4}]),
    ("train.dumps", [{"url": "s3://bucket/run-a"}, {"url": "s3://bucket/run-b", "alpha": 1.1}]),
    ("train.dumps", [{"url": "s3://bucket/run-a"}, {"url": None}]),
    ("train.shuffle", "all"),
    ("train.shuffle_bytes", 2**20 - 1),
    ("train.shuffle_window_units", 0),
    ("train.shuffle_block_units", 0),
    ("train.head_chunk_tokens", 0),
    ("train.logging_steps", 0),
    ("train.save_steps", 0),
    ("train.save_minutes", 0),
    ("train.snapshot_bytes", -1),
    ("train.save_total_limit", 0),
    ("train.resume", "yes"),
    ("train.report_to", ["excel"]),
    ("train.data_wait_seconds", 0),
]


@pytest.mark.parametrize(("path", "value"), BOUNDS, ids=[f"{path}={value}" for path, value in BOUNDS])
def test_every_bound_refuses_and_names_its_field(file: Path, path: str, value: object) -> None:
    message = problems(file, f"{path}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...')}")
    assert "has 1 problem" in message
    assert path in message
    assert "got" in message


def test_every_key_of_the_schema_is_known_to_the_suggestions(file: Path) -> None:
    config = load_config(file)
    for section in ("dump", "teacher", "corpus", "heldout", "student", "loss", "train"):
        for name in type(getattr(config, section)).model_fields:
            assert f"did you mean {section}.{name}?" in problems(file, f"{section}.{name}_=1")


def test_sections_must_agree(file: Path) -> None:
    assert "train -> zero_stage 0 with bf16" in problems(file, "train.zero_stage=0")
    assert load_config(file, ["temperatures=[1, 2]", "loss.temperature=2"]).loss.temperature == 2.0
    draws = problems(file, "temperatures=[1, 2]", "loss.temperature=2", "estimator.kind=sampled")
    assert "loss.temperature -> must be 1.0 with estimator.kind sampled" in draws
    assert "temperatures -> must be [1.0] with estimator.kind sampled" in draws
    # An arm without a divergence has no use for the temperature; without a teacher, only the dump knows.
    assert load_config(file, ["loss.temperature=2", "train.arm=sft"])
    assert load_config(file, ["loss.temperature=2", "teacher=null"])


def test_overrides_are_yaml_and_reach_into_lists_and_missing_sections(file: Path) -> None:
    overrides = [
        "train.learning_rate=1e-4",
        "train.max_steps=3",
        "train.deepspeed={zero_optimization: {reduce_bucket_size: 1e6}}",
        "student.lora.target_modules=[q_proj, v_proj]",
        "corpus.sources.0.path=other.jsonl",
        "heldout=null",
    ]
    config = load_config(file, overrides)
    assert config.train is not None
    assert config.train.learning_rate == 1e-4
    assert config.train.max_steps == 3
    assert config.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1e6}}
    assert config.student is not None
    assert config.student.lora.target_modules == ["q_proj", "v_proj"]
    assert config.corpus is not None
    assert config.corpus.sources[0].path == "other.jsonl"
    assert config.heldout is None


def test_an_override_of_the_kind_starts_the_estimator_anew(file: Path) -> None:
    file.write_text(FULL.replace("kind: topk, k: 64, mass: 0.999", "kind: sampled, draws: 50"))
    for order in (1, -1):
        assert load_config(file, ["estimator.k=32", "estimator.kind=topk"][::order]).estimator == TopK(k=32)
    assert load_config(file, ["estimator={k: 5}", "estimator.kind=sampled"]).estimator == Sampled(kind="sampled")
    hint = "estimator.kind sampled has none, topk has: --set 'estimator={kind: topk, k: ...}'"
    assert hint in problems(file, "estimator.k=32")
    file.write_text(FULL)
    assert load_config(file, ["estimator.kind=sampled", "estimator.draws=9"]).estimator == Sampled(
        kind="sampled", draws=9
    )
    assert load_config(file, ["estimator.kind=adaptive"]).estimator == Adaptive(kind="adaptive")
    assert load_config(file, ["estimator.kind=topk"]).estimator == TopK(k=64, mass=0.999)
    file.write_text("dump: {url: x}\nestimator: {k: 8}")
    assert load_config(file, ["estimator.mass=1.0"]).estimator == TopK(k=8, mass=1.0)


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train..epochs=3", ".=3", "train.epochs=[1"])
def test_an_override_that_cannot_be_understood_is_a_usage_error(file: Path, text: str) -> None:
    with pytest.raises(UsageError, match="override"):
        load_config(file, [text])


def test_an_override_into_a_value_or_beyond_a_list_is_a_problem(file: Path) -> None:
    assert "train.epochs.x -> train.epochs is a value, not a section, got 1" in problems(file, "train.epochs.x=2")
    assert "no such element; the list has 1" in problems(file, "corpus.sources.1.path=b")
    assert "no such element; the list has 1" in problems(file, "corpus.sources.path=b")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dump: {url: a}\ndump: {url: b}", "duplicate key 'dump'"),
        ("dump: {url: a, url: b}", "duplicate key 'url'"),
        ("dump: {url: a}\n1: 2", "key 1 is not text"),
        ("dump: [", "not a valid YAML file"),
        ("dump: !!python/object/apply:os.getpid []", "not a valid YAML file"),
        ("", "got:      an empty file"),
        ("- a", "got:      list"),
        ("dump: 3", "dump -> must be a section"),
        ("train: {output: x}", "dump.url -> missing, but required"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    assert complaint in problems(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path)
    binary, large = tmp_path / "binary.yaml", tmp_path / "large.yaml"
    binary.write_bytes(b"\xff\xfe\xfa\x00a")
    large.write_bytes(b"#" * MAX_BYTES + b"\n")
    assert "not a valid YAML file" in problems(binary)
    assert "<= 1 MiB" in problems(large)


def test_relative_paths_stay_relative(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.sep)
    config = load_config(file)
    assert config.train is not None
    assert config.train.output == Path("runs/a")


def test_heldout_config_swaps_corpus_and_url(file: Path) -> None:
    config = load_config(file)
    heldout = config.heldout_config()
    assert heldout.dump.url == "s3://bucket/run-a-heldout"
    assert heldout.corpus is not None
    assert heldout.corpus.sources[0].path == "b.jsonl"
    assert heldout.dump.samples_per_unit == config.dump.samples_per_unit
    assert heldout.corpus.mask == "assistant"
    assert heldout.teacher == config.teacher
    with pytest.raises(MismatchError, match="heldout"):
        heldout.heldout_config()


@pytest.mark.parametrize(
    ("overrides", "stored"),
    [
        (["estimator.k=32"], TopK(k=32, mass=0.999)),
        (["estimator.kind=sampled"], TopK()),
        (["estimator.kind=adaptive"], TopK()),
        (["estimator.kind=sampled", "heldout.estimator.k=256"], TopK(k=256)),
        (["heldout.estimator={kind: sampled}"], Sampled(kind="sampled")),
        (["heldout.estimator.kind=sampled", "heldout.estimator.draws=9"], Sampled(kind="sampled", draws=9)),
    ],
)
def test_held_out_samples_are_compared_without_noise_unless_asked_for(
    file: Path, overrides: list[str], stored: Estimator
) -> None:
    assert load_config(file, overrides).heldout_config().estimator == stored


def test_what_the_held_out_estimator_cannot_is_told_by_its_own_name(file: Path) -> None:
    drawn = "heldout.estimator.kind=sampled"
    assert "temperatures -> must be [1.0] with heldout.estimator.kind sampled" in problems(
        file, drawn, "temperatures=[1, 2]"
    )
    assert "heldout.estimator.kind -> must be topk with teacher.backend vllm" in problems(
        file, drawn, "teacher.backend=vllm", "dump.logsumexp=false"
    )
    assert "and --set estimator.kind" not in problems(
        file, "estimator.kind=topk", "heldout={url: x, estimator: {kind: sampled}}", "temperatures=[1, 2]"
    )
    message = problems(file, "heldout.estimator={kind: adaptive, kmax: 8}")
    assert "heldout.estimator.kmax -> unknown key; did you mean heldout.estimator.k_max?" in message


def test_a_config_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="sections disagree"):
        Config.model_validate({"dump": {"url": "a"}, "heldout": {"url": "a", "sources": [{"path": "x"}]}})


def test_a_divergence_that_draws_cannot_estimate_is_told_before_the_dump_is_paid(file: Path) -> None:
    found = problems(file, "loss.divergence=reverse_kl", "estimator.kind=adaptive")
    assert "loss.divergence -> must be forward_kl with estimator.kind adaptive" in found
    assert load_config(file, ["loss.divergence=reverse_kl"])
    assert load_config(file, ["loss.divergence=reverse_kl", "estimator.kind=adaptive", "train.arm=lora"])


def test_a_default_estimator_is_not_written_where_the_dump_decides(tmp_path: Path) -> None:
    """A configuration of stage two alone that states none, kept beside its results and run again, states none."""
    file = tmp_path / "a.yaml"
    file.write_text("dump: {url: d}\nstudent: {model: m}\ntrain: {output: o}\n")
    config = load_config(file)
    assert stated(config) == {}
    file.write_text(config.to_yaml())
    assert stated(load_config(file)) == {}
    assert load_config(file) == config
    config = load_config(file, ["estimator.k=8", "temperatures=[1]"])
    file.write_text(config.to_yaml())
    assert stated(load_config(file)) == {
        "estimator.kind": "topk", "estimator.k": 8, "estimator.mass": 0.999, "temperatures": (1.0,)
    }  # fmt: skip


def test_a_password_in_a_url_is_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("dump:\n  url: s3://user:canary/pass@bucket/x\n")
    with pytest.raises(MismatchError, match=r"dump\.url(.|\n)*credentials") as caught:
        load_config(file)
    assert "canary" not in str(caught.value)


def test_hostile_files_are_told_in_an_instant(file: Path) -> None:
    """Aliases that stand for more than any memory, brackets, numbers and characters that nobody writes by hand."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    merges = "a0: &a0 {x: 1}\n"
    merges += "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
    for text, complaint in {
        bomb: "aliases",
        merges: "aliases",
        "a: &a [*a]": "aliases",
        "a: " + "[" * 20_000: "nested too deeply",
        "a: " + "9" * 5_000: "a number",
        "dump: {url: '\0'}": "not a valid YAML file",
        'dump: {url: "a\\0b"}': "NUL",
        "dump: {url: " + "x" * 900_000 + ": 1}": "YAML",
        "dump: 2001-99-99": "date",
    }.items():
        file.write_text(text)
        started = time.monotonic()
        message = problems(file)
        assert complaint in message
        assert len(message) < 2_000
        assert time.monotonic() - started < 10
    for value in ("[" * 20_000, "9" * 5_000, "*x"):
        with pytest.raises(UsageError, match="not YAML"):
            load_config(file, [f"dump.url={value}"])


def test_a_long_value_is_cut_before_it_is_printed(file: Path) -> None:
    file.write_text("x: &x " + "y" * 400_000 + "\ndump: {url: a}\nloss: [" + ", ".join(["*x"] * 40_000) + "]\n")
    started = time.monotonic()
    assert len(problems(file)) < 500
    assert time.monotonic() - started < 10


def test_a_section_that_only_the_command_line_makes_is_blamed_on_it(file: Path) -> None:
    assert "--set: estimater -> unknown key; did you mean estimator?" in problems(file, "estimater.k=5")
    file.write_text(FULL + "estimater: {k: 5}\n")
    assert f"{file}: estimater -> unknown key" in problems(file, "estimater.k=6")


def test_names_of_other_trainers_are_translated(file: Path) -> None:
    assert "did you mean train.micro_batch_size?" in problems(file, "train.per_device_train_batch_size=3")
    assert "did you mean student.lora.r?" in problems(file, "student.lora.rank=8")
    assert "must be a list" in problems(file, "temperatures=2")


def test_the_students_cluster_names_the_held_out_dump_alone(file: Path) -> None:
    """Its samples are the teacher's business, which says so when it needs them."""
    found = load_config(file, ["heldout.sources=[]"])
    assert found.heldout is not None
    with pytest.raises(MismatchError, match="needs the held-out samples"):
        found.heldout_config()
