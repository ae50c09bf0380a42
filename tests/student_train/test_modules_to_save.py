"""`student.lora.modules_to_save`: trained in full beside the adapter, resumed, saved and merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Trace, assert_same_steps, train_plainly
from peft import PeftModel
from safetensors.torch import load_file
from support.distributed import Ranks, run_ranks
from support.rounding import FORWARD, update_excess
from support.tiny_student import tiny_llama
from transformers import AutoModelForCausalLM

from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from student_train.config import LoraSection
from student_train.model.adapter import attach
from student_train.results.merge import merge

BATCH, STEPS, RATE, CLIP = 6, 3, 1e-2, 0.3
NAMES = {"ends": ["embed_tokens", "lm_head"], "head": ["lm_head"], "norm": ["norm"]}
CASES = [("student", "ends", 0), ("student", "ends", 2), ("student", "ends", 3), ("student", "norm", 1),
         ("student", "head", 3), ("tied", "head", 0), ("tied", "ends", 2), ("tied", "head", 3)]  # fmt: skip
"""(student, modules, ZeRO stage)"""
IDS = torch.arange(20)[None]
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Else ZeRO-3 keeps the small weights of these models whole on every rank."""


@pytest.fixture(scope="module")
def steps(folder: Path) -> list[dict[str, Any]]:
    """Some steps of all cases on two ranks, of rank 0."""
    cases = [
        {
            "model": str(folder / model),
            "lora": {"modules_to_save": NAMES[names]},
            "train": {
                "zero_stage": stage, "max_grad_norm": CLIP, "global_batch_size": BATCH, "learning_rate": RATE,
                "deepspeed": SPREAD if stage == 3 else {},
            },
            "steps": STEPS,
        }
        for model, names, stage in CASES
    ]  # fmt: skip
    return run_ranks("support.engine_jobs:run_cases", 2, dump=str(folder / "dump"), cases=cases)[0]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[tuple[str, str], Trace]:
    """The same in plain torch and peft on one process, with dense logits and ordinary autograd."""
    dump = Dump.open(str(folder / "dump"))
    return {
        (model, names): train_plainly(
            dump, str(folder / model), arm="neo", steps=STEPS, batch=BATCH, rate=RATE, clip=CLIP,
            modules_to_save=NAMES[names],
        )
        for model, names in {(model, names) for model, names, _ in CASES}
    }  # fmt: skip


@pytest.mark.exact
@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_equals_plain_torch(case: int, steps: list[dict[str, Any]], plain: dict[tuple[str, str], Trace]) -> None:
    """Losses, gradients, their norm and, after some clipped steps, the weights: of the adapter and of the modules."""
    model, names, _ = CASES[case]
    expected, found = plain[model, names], steps[case]
    saved = {key for key in expected.first if key.startswith("exp_avg/") and "modules_to_save" in key}
    assert len(saved) == {"norm": 5, "head": 1, "ends": 1 if model == "tied" else 2}[names]
    assert all(float(expected.first[key].abs().max()) > 0 for key in saved)
    assert_same_steps(found, expected, rate=RATE)


class Trainings:
    """Trainings with `modules_to_save` on two ranks, which stay, or on one."""

    def __init__(self, folder: Path, ranks: dict[int, Ranks]) -> None:
        self.folder, self._ranks = folder, ranks

    def __call__(self, name: str, model: str, names: str, *, ranks: int = 2, **more: Any) -> dict[str, Any]:
        """What rank 0 says."""
        job = {
            "model": str(self.folder / model), "dump": str(self.folder / "dump"), "output": str(self.folder / name),
            "lora": {"modules_to_save": NAMES[names], **more.pop("lora", {})}, **more,
        }  # fmt: skip
        job |= {"copy": str(self.folder / job["copy"])} if "copy" in job else {}
        return self._ranks[ranks].call(job=job)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def training(folder: Path) -> Iterator[Trainings]:
    """Runs trainings."""
    ranks = {n: Ranks("support.train_jobs:trainer", n) for n in (1, 2)}
    yield Trainings(folder, ranks)
    for some in ranks.values():
        some.close()


@pytest.mark.parametrize(("model", "names", "variant"), [("student", "ends", "lora"), ("tied", "head", "pissa")])
def test_resumed_at_other_stages_and_ranks_saved_and_merged(
    model: str, names: str, variant: str, training: Trainings, tmp_path: Path
) -> None:
    """Stopped at stage 2 on two ranks: the same bits there, and the same numbers at stage 3 and on one rank; peft loads
    what is left behind, and merged it is one plain model."""
    name, lora = f"{model}-{names}", {"lora": {"variant": variant}}
    whole = training(f"{name} whole", model, names, **lora)
    assert training(f"{name} half", model, names, stop_after=3, **lora)["code"] == 75
    half = training(f"{name} half state", model, names, copy=f"{name} half", stop_after=1, **lora)
    others = [
        training(f"{name} rest", model, names, copy=f"{name} half", **lora),
        training(
            f"{name} at 3", model, names, copy=f"{name} half", train={"zero_stage": 3, "deepspeed": SPREAD}, **lora
        ),
        training(f"{name} alone", model, names, copy=f"{name} half", ranks=1, train={"zero_stage": 1}, **lora),
    ]
    assert [run["code"] for run in (whole, *others)] == [0] * 4, [run["message"] for run in (whole, *others)]
    assert all(torch.equal(others[0]["state"][key], value) for key, value in whole["state"].items())
    for run in others[1:]:
        assert [e.loss for e in run["events"]] == pytest.approx([e.loss for e in whole["events"]], rel=FORWARD)
        assert update_excess(run["state"], whole["state"], first=half["state"], rate=1e-2, steps=3) < 1
    with torch.no_grad():
        final = training.folder / f"{name} whole" / "final"
        base = AutoModelForCausalLM.from_pretrained(training.folder / model, dtype=torch.float32)
        before = base(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(base, final).eval()(input_ids=IDS).logits
        key = next(key for key in whole["state"] if key.startswith("master/") and "modules_to_save" in key)
        stored = key.removeprefix("master/").replace(".modules_to_save.default", "")
        assert torch.equal(load_file(final / "adapter_model.safetensors")[stored], whole["state"][key])
        assert f"and `{', '.join(NAMES[names])}` in full" in (final / "README.md").read_text()
        merge(final, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        assert (ends[0] is ends[1]) is (model == "tied")
        assert torch.equal(ends["embed" not in key], whole["state"][key])
        off = float((merged(input_ids=IDS).logits - expected).abs().max() / expected.abs().max())
        assert off < FORWARD
        assert float((before - expected).abs().max() / expected.abs().max()) > 0.05


def test_another_list_is_another_run(training: Trainings) -> None:
    """It decides the result; where it is empty, a checkpoint is that of before there was such a list."""
    assert training("norm", "student", "norm", stop_after=3)["code"] == 75
    other = training("other", "student", "head", copy="norm")
    assert other["code"] == 78
    assert "student.lora.modules_to_save" in other["message"]


def test_an_adapter_begins_from_one_with_the_same_modules(training: Trainings) -> None:
    """And is refused where the other one has none."""
    first = training("first", "tied", "head")
    assert first["code"] == 0, first["message"]
    adapter = str(training.folder / "first" / "final")
    second = training("second", "tied", "head", adapter=adapter, train={"learning_rate": 1e-9})
    assert second["code"] == 0, second["message"]
    for key, value in first["state"].items():
        if key.startswith("master/"):
            assert torch.allclose(second["state"][key], value, atol=1e-7)
    refused = training("third", "tied", "norm", adapter=adapter)
    assert refused["code"] == 78
    assert "modules_to_save" in refused["message"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["lm_heads"], "names no module of the student that has weights"),
        (["rotary_emb"], "names no module of the student that has weights"),
        (["lp"], "meet in one module"),
        (["proj"], "PEFT rejected"),
        (["mlp", "up_proj"], "got:      model.layers.0.mlp.up_proj"),
        (["up_proj", "layers.1"], "got:      model.layers.1.mlp.up_proj"),
    ],
)
def test_modules_are_checked(names: list[str], says: str) -> None:
    """peft passes over a name that nothing has, trains an adapter's layer twice, and gives what is in a module that it
    has copied a copy that is never used."""
    targets = ["q_proj"] if len(names) > 1 else "all-linear"
    with pytest.raises(MismatchError) as error:
        attach(tiny_llama(1), LoraSection(r=2, modules_to_save=names, target_modules=targets), seed=0)
    assert says in str(error.value)


def test_a_shared_head_with_a_bias_is_refused() -> None:
    """peft makes its trained copy from the embeddings alone, without the bias."""
    model = tiny_llama(1, tied=True)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(96))
    with pytest.raises(MismatchError, match="cannot train the head"):
        attach(model, LoraSection(r=2, modules_to_save=["lm_head"]), seed=0)
    attach(model, LoraSection(r=2, modules_to_save=["norm"]), seed=0)
