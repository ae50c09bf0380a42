"""The model card: what the hub reads of it, what people read of it, and the code in it."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.engine_jobs import some_event, train_section
from support.tiny_student import write_dump

from storage_schemas.config import Sampled
from storage_schemas.reader import Dump
from student_train.config import METHODS, LoraSection, LossSection, StudentSection
from student_train.metrics import Event
from student_train.results.model_card import CURVE_POINTS, Evaluation, merged_card, model_card

BEFORE = {"kl_mean": 2.5, "ce": 3.0, "top1_agreement": 0.25, "supervised_tokens": 1234}


@pytest.fixture
def dump(folder: Path) -> Dump:
    """A dump of a tiny teacher."""
    return Dump.open(str(folder / "dump"))


def events(count: int) -> list[Event]:
    """Steps 1 ... count; the loss is the step, and later steps hold more tokens."""
    return [
        some_event(i, epoch=i / 8, loss=i, ce=2 * i, kl=3 * i, learning_rate=i * 1e-4, supervised_tokens=10 * i)
        for i in range(1, count + 1)
    ]


def card(dump: Dump, count: int = 3, **changes: Any) -> str:
    """A card, by default of a plain run."""
    student = StudentSection(model=changes.pop("model", "org/student"), revision=changes.pop("revision", None),
                             lora=LoraSection(r=4, variant=changes.pop("variant", "lora")))  # fmt: skip
    loss, evaluation = LossSection(**changes.pop("loss", {})), changes.pop("evaluation", None)
    train = train_section(Path("runs/a"), **changes)
    return model_card(
        [dump], student, loss, train, events(count), folder=Path("runs/a/final"), evaluation=evaluation
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arm", "library", "relation", "tags"),
    [
        ("neo", "peft", "adapter", ["llm-neo", "knowledge-distillation", "lora", "moslora"]),
        ("lora", "peft", "adapter", ["llm-neo", "lora", "moslora"]),
        ("kd", "transformers", "finetune", ["llm-neo", "knowledge-distillation"]),
        ("sft", "transformers", "finetune", ["llm-neo"]),
    ],
)
def test_front_matter(arm: str, library: str, relation: str, tags: list[str], dump: Dump) -> None:
    """As the hub parses it."""
    text = card(dump, arm=arm, variant="moslora")
    assert f"# student: {METHODS[arm]} from teacher\n" in text
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": "org/student", "base_model_relation": relation, "library_name": library,
        "pipeline_tag": "text-generation", "tags": tags,
    }  # fmt: skip


def test_it_names_every_dump_that_was_mixed(dump: Dump, tmp_path: Path) -> None:
    """With its teacher, fingerprint, weight, targets and alpha."""
    write_dump(tmp_path / "other", first=50, estimator=Sampled(kind="sampled"))
    other = Dump.open(str(tmp_path / "other"))
    train = train_section(
        Path("runs/a"), dumps=[{"url": dump.store.url}, {"url": other.store.url, "weight": 0.5, "alpha": 0.25}]
    )
    text = model_card(
        [dump, other], StudentSection(model="org/student"), LossSection(), train, events(3), folder=Path("final")
    )
    assert f"| dump 1 | `{dump.store.url}`, fingerprint `{dump.fingerprint}`, weight 1, alpha = 0.5 |" in text
    assert f"| dump 2 | `{other.store.url}`, fingerprint `{other.fingerprint}`, weight 0.5, alpha = 0.25 |" in text
    assert "| targets 2 | kind sampled, draws 50" in text
    assert "# student: lora_kd from teacher\n" in text
    assert "alpha that of each dump, D" in text


@pytest.mark.parametrize("model", ["/models/student", "../student", "a/b/c", "existing"])
def test_a_directory_is_no_base_on_the_hub(
    model: str, dump: Dump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub would refuse the whole card."""
    monkeypatch.chdir(tmp_path)
    Path("existing").mkdir()
    assert "base_model" not in ModelCard(card(dump, model=model)).data.to_dict()


def test_it_tells_what_decides_the_result(dump: Dump) -> None:
    """Teacher, dump, loss, adapter and training."""
    text = card(dump, variant="pissa", revision="v1", loss={"divergence": "jsd", "beta": 0.3, "alpha": 0.9})
    for part in (
        "`org/student`, revision `v1`", "| teacher | `teacher`, float32 |", f"fingerprint `{dump.fingerprint}`",
        "kind topk, k 8, mass 1.0", "alpha = 0.9, D = `jsd` at T = 1, beta = 0.3",
        "`pissa`, r = 4, alpha = 8, dropout 0, on `all-linear`, saved as a plain LoRA of twice the rank",
        "3 steps of 6 samples, 0.38 epochs, 60 supervised tokens", "AdamW, 0.01, cosine with 10 % warm-up",
        "fp32, DeepSpeed ZeRO-2", "llm-neo 0",
    ):  # fmt: skip
        assert part in text, part
    assert "## Evaluation" not in text
    plain = card(dump, arm="sft")
    assert "| loss | cross-entropy |" in plain
    assert "| adapter |" not in plain
    assert "| 3 | 3.0000 | 6.0000 | - | 3.00e-04 |" in plain


@pytest.mark.parametrize("count", [1, 3, CURVE_POINTS, 25, 997])
def test_the_curve_is_short_and_weighs_tokens(count: int, dump: Dump) -> None:
    """Every step is in one row, every row is a mean per token, and the last one ends with the run."""
    rows = [line.strip("| ").split(" | ") for line in card(dump, count).splitlines() if line[:3].strip("| ").isdigit()]
    assert len(rows) == min(count, CURVE_POINTS)
    first = 1
    for step, loss, ce, kl, rate in rows:
        span = range(first, int(step) + 1)
        mean = sum(i * i for i in span) / sum(span)
        assert [float(x) for x in (loss, ce, kl)] == pytest.approx([mean, 2 * mean, 3 * mean], abs=1e-4)
        assert float(rate) == pytest.approx(int(step) * 1e-4, rel=1e-2)
        first = int(step) + 1
    assert first == count + 1


def test_evaluation_is_told_where_there_is_one(dump: Dump) -> None:
    """Drawn targets have no agreement."""
    after = BEFORE | {"kl_mean": 1.25, "ce": 2.0, "top1_agreement": 0.5}
    text = card(dump, evaluation=Evaluation(url="s3://b/held", before=BEFORE, after=after))
    assert "on 1,234 supervised tokens of `s3://b/held`" in text
    assert "| KL(teacher, student), nats per token | 2.5000 | 1.2500 |" in text
    assert "KL is at temperature 1:" in text
    assert "| same most likely token | 25.0% | 50.0% |" in text
    none = {"top1_agreement": None}
    text = card(dump, evaluation=Evaluation(url="x", before=BEFORE | none, after=after | none))
    assert "cross-entropy, nats" in text
    assert "same most likely" not in text


def test_the_merged_model_has_the_card_of_a_model(dump: Dump) -> None:
    """And what the owner has added to the adapter's."""
    own = (
        card(dump).replace("library_name", "license: apache-2.0\nlibrary_name").replace("## Training", "Mine.\n\n## T")
    )
    found = merged_card(own, Path("merged"))
    assert found is not None
    data = ModelCard(found).data.to_dict()
    assert (data["library_name"], data["base_model_relation"], data["license"]) == (
        "transformers", "finetune", "apache-2.0"
    )  # fmt: skip
    assert dump.fingerprint in found
    assert "Mine." in found
    assert "peft import" not in found
    assert "AutoModelForCausalLM.from_pretrained('merged'" in found
    assert found.count("## Use") == 1
    local = merged_card(card(dump, model="/models/student"), Path("merged"))
    assert local is not None
    assert "base_model" not in local


@pytest.mark.parametrize(
    "text", ["", "# A card\n", "---\n: [\n---\n# broken\n", "---\njust text\n---\n", "---\na: 1\n"]
)
def test_other_readmes_are_left_alone(text: str) -> None:
    """No card is better than a broken one."""
    assert merged_card(text, Path("merged")) is None
