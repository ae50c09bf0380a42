"""bf16: fp32 masters and moments that any world size and stage restores to the bit; and no quantised student."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.tiny_student import save_student, write_dump

from storage_schemas.errors import MismatchError
from student_train.student import load_model

FUNCTION = "support.engine_jobs:run_cases"
DRIFT = 2e-2
"""Of a loss, relative, in the three steps after bf16 was resumed at another size or stage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump and a student."""
    folder = tmp_path_factory.mktemp("precision")
    write_dump(folder / "dump")
    save_student(folder / "student")
    return folder


def case(folder: Path, stage: int, **changes: Any) -> dict[str, Any]:
    """A small bf16 run."""
    train = {"precision": "bf16", "zero_stage": stage}
    return {"model": str(folder / "student"), "train": train} | changes


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_state_is_restored_exactly_elsewhere(ranks: int, folder: Path) -> None:
    """From ZeRO-2 on two ranks to any stage on `ranks`: every master and moment; then it drifts by rounding."""
    whole = run_ranks(
        FUNCTION, 2, dump=str(folder / "dump"), cases=[case(folder, 2, steps=3), case(folder, 2, steps=6)]
    )
    state, expected = whole[0][0]["last"], whole[0][1]["steps"][3:]
    masters = [value for key, value in state.items() if key.startswith("master/")]
    assert all(value.dtype == torch.float32 for value in state.values())
    assert any(not value.bfloat16().float().equal(value) for value in masters), "masters keep what bf16 would lose"
    resumed = {"state": state, "first": 3}
    cases = [case(folder, stage, steps=steps, **resumed) for stage in (1, 2, 3) for steps in (0, 3)]
    found = run_ranks(FUNCTION, ranks, dump=str(folder / "dump"), cases=cases)[0]
    for restored, trained in zip(found[::2], found[1::2], strict=True):
        assert restored["last"].keys() == state.keys()
        assert all(restored["last"][key].equal(value) for key, value in state.items())
        for (loss, *_), (reference, *_) in zip(trained["steps"], expected, strict=True):
            assert loss == pytest.approx(reference, rel=DRIFT)


def test_a_quantised_student_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before its weights are looked at, with the reason."""
    save_student(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match="is quantised") as error:
        load_model(str(tmp_path / "student"), None, dtype=torch.float32)
    assert "unquantised" in str(error.value)
