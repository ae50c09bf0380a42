"""bf16: fp32 masters and moments that any world size and stage restores to the bit; and no quantised student."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.engine_jobs import gradients, norm
from support.tiny_student import save_student

from storage_schemas.common.errors import MismatchError
from student_train.model.load import load_model

FUNCTION = "support.engine_jobs:run_cases"
DRIFT = 2e-2
"""Of a loss, relative, in the three steps after bf16 was resumed at another size or stage."""


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


@pytest.mark.slow
def test_gradients_of_many_micro_batches_are_as_good_as_of_one(folder: Path) -> None:
    """256 micro-batches of one sample against 4 of 64, by their distance to fp32: what a bf16 sum would lose is kept.

    Each term is rounded in its own forward and backward pass, 2 % here. A sum in bf16 adds its own rounding with every
    term, and loses those below 2^-9 of it.
    """
    size, bf16 = {"global_batch_size": 256, "max_grad_norm": 0.0}, {"data_types": {"grad_accum_dtype": "bf16"}}
    trains = [{"precision": "fp32", "zero_stage": 2, "micro_batch_size": 64}]
    trains += [
        {"precision": "bf16", "zero_stage": stage, "micro_batch_size": micro, "deepspeed": more}
        for stage, micro, more in [(2, 64, {}), (1, 1, {}), (2, 1, {}), (3, 1, {}), (2, 1, bf16)]
    ]
    cases = [case(folder, 2) | {"train": size | train} for train in trains]
    reference, *found = [
        gradients(result["first"]) for result in run_ranks(FUNCTION, 1, dump=str(folder / "dump"), cases=cases)[0]
    ]
    off = [norm({k: g[k] - reference[k] for k in reference}) / norm(reference) for g in found]
    assert 0.001 < off[0] < 0.04, off
    for many in off[1:4]:
        assert many < 1.05 * off[0], off
    assert off[4] > 1.5 * off[0], off


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
