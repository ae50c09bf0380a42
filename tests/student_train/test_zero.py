"""The DeepSpeed configuration: presets, what the user may change, and what contradicts the rest."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storage_schemas.common.errors import MismatchError
from student_train.config import DEEPSPEED_PRESETS, TrainSection
from student_train.zero import OURS, deepspeed_config, sized


def section(**changes: Any) -> TrainSection:
    """A train section."""
    return TrainSection(output=Path("run"), **changes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_preset_follows_the_section(stage: int) -> None:
    """Stage, precision, clipping; one boundary per step; and no batch size that depends on the number of ranks."""
    precision = "bf16" if stage else "fp32"
    config = deepspeed_config(
        section(zero_stage=stage, precision=precision, max_grad_norm=0.7, micro_batch_size=3, global_batch_size=7)
    )
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] is (precision == "bf16")
    assert config["gradient_clipping"] == 0.7
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["managed_gradient_accumulation"] is False
    assert config["gradient_accumulation_steps"] == 1
    assert config["zero_allow_untested_optimizer"] is True
    assert "train_batch_size" not in config
    assert "optimizer" not in config


def test_user_settings_win_over_the_preset() -> None:
    """A leaf is replaced, its neighbours stay, and the section is left as it was."""
    given = {
        "zero_optimization": {"reduce_bucket_size": 5, "contiguous_gradients": False}, "wall_clock_breakdown": True,
    }  # fmt: skip
    train = section(zero_stage=2, deepspeed=given)
    config = deepspeed_config(train)
    assert config["zero_optimization"]["reduce_bucket_size"] == 5
    assert config["zero_optimization"]["contiguous_gradients"] is False
    assert config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True
    assert train.deepspeed == given == {
        "zero_optimization": {"reduce_bucket_size": 5, "contiguous_gradients": False}, "wall_clock_breakdown": True,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buffers_are_as_large_as_what_is_trained(stage: int) -> None:
    """DeepSpeed's own are 1 GB in bf16, and its threshold keeps no adapter of a large model whole. The user's stay."""
    lora, full = (section(zero_stage=stage, precision="fp32", method=method) for method in ("lora_kd", "full_kd"))
    # What the adapter's factors come to says nothing of a head that is trained beside them, or of many experts' rows.
    sizes = {"q.lora_A.default.weight": 300_000, "q.lora_B.default.weight": 200_000, "lm_head.weight": 10**8}
    zero = sized(deepspeed_config(lora), lora, sizes)["zero_optimization"]
    assert zero.get("reduce_bucket_size") == (100_500_000 if stage else None)
    assert zero.get("stage3_param_persistence_threshold") == (300_000 if stage == 3 else None)
    experts = sized(deepspeed_config(lora), lora, {"e.lora_A.default.weight": 10**8})["zero_optimization"]
    assert experts.get("stage3_param_persistence_threshold") == (2**22 if stage == 3 else None)
    zero = sized(deepspeed_config(full), full, {"a": 10**9, "b": 10})["zero_optimization"]
    assert zero.get("reduce_bucket_size") == (5 * 10**8 if stage else None)
    assert zero.get("stage3_param_persistence_threshold") == (100_000 if stage == 3 else None)
    if stage:
        own = section(zero_stage=stage, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}})
        assert sized(deepspeed_config(own), own, {"a": 1})["zero_optimization"]["reduce_bucket_size"] == 7


def test_a_configuration_for_the_trainer_is_taken() -> None:
    """`auto` means what the section says, or DeepSpeed's default, and equal values are no contradiction."""
    config = deepspeed_config(
        section(
            zero_stage=3,
            global_batch_size=32,
            deepspeed={
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto", "loss_scale": 0},
                "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "sub_group_size": 10},
                "gradient_clipping": "auto",
                "train_batch_size": 32,
                "train_micro_batch_size_per_gpu": "auto",
            },
        )
    )
    assert "auto" not in str(config)
    assert "fp16" not in config
    assert "reduce_bucket_size" not in config["zero_optimization"]
    assert config["zero_optimization"]["sub_group_size"] == 10
    assert config["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"zero_optimization": {"stage": 3}}, ("train.deepspeed.zero_optimization.stage = 3", "train.zero_stage")),
        ({"bf16": {"enabled": False}}, ("train.deepspeed.bf16.enabled", "train.precision")),
        ({"gradient_clipping": 5.0}, ("train.deepspeed.gradient_clipping", "train.max_grad_norm")),
        ({"train_batch_size": 64}, ("train.deepspeed.train_batch_size", "train.global_batch_size")),
        ({"train_micro_batch_size_per_gpu": 1}, ("micro_batch_size_per_gpu", "train.micro_batch_size")),
        ({"gradient_accumulation_steps": 8}, ("gradient_accumulation_steps", "global tokens")),
        ({"optimizer": {"type": "Lamb"}}, ("train.deepspeed.optimizer", "train.learning_rate")),
        ({"scheduler": {"type": "WarmupLR"}}, ("train.deepspeed.scheduler", "train.lr_scheduler_type")),
        ({"fp16": {"enabled": True}}, ("train.deepspeed.fp16", "train.precision")),
        ({"wall_clock_brakedown": True}, ("wall_clock_brakedown", "did you mean wall_clock_breakdown?")),
        ({"zzz": 1}, ("zzz", "one of ")),
        ({"compile": {"deepcompile": True}}, ("train.deepspeed.compile", "one of ")),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ("activation_checkpoi", "gradient_checkpointing")),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, ("data_types.grad_accum_dtype", "train.precision bf16")),
    ],
)
def test_contradiction_names_both_sides(given: dict[str, Any], names: tuple[str, ...]) -> None:
    """Exit 78; the message says what stands against what."""
    with pytest.raises(MismatchError) as error:
        deepspeed_config(section(zero_stage=2, deepspeed=given))
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("stage", "given", "says"),
    [
        (0, {"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype does not go with"),
        (2, {"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype does not go with"),
        (0, {"zero_optimization": {"overlap_comm": True}}, "overlap_comm needs ZeRO stage 2 or 3"),
        (1, {"zero_optimization": {"overlap_comm": True}}, "overlap_comm needs ZeRO stage 2 or 3"),
        (2, {"communication_data_type": "bf16"}, "communication_data_type does not go with train.precision fp32"),
        (2, {"communication_data_type": "fp16"}, "communication_data_type does not go with train.precision fp32"),
        (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "offload_optimizer.ratio"),
        (2, {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow needs"),
        (3, {"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow needs"),
    ],
)
def test_what_deepspeed_would_meet_with_an_assertion(stage: int, given: dict[str, Any], says: str) -> None:
    """Or with gradients of fp32 weights in bf16."""
    with pytest.raises(MismatchError, match=says):
        deepspeed_config(section(zero_stage=stage, precision="fp32", deepspeed=given))


def test_gradients_are_sent_as_they_are() -> None:
    """In their own dtype or in fp32; what has no effect is taken."""
    for precision, dtypes in (("fp32", ["fp32"]), ("bf16", ["bf16", "fp32"])):
        for dtype in dtypes:
            given = {"communication_data_type": dtype}
            found = deepspeed_config(section(precision=precision, deepspeed=given))
            assert found["communication_data_type"] == dtype
    with pytest.raises(MismatchError, match=r"communication_data_type.*\n  got:      fp16"):
        deepspeed_config(section(deepspeed={"communication_data_type": "fp16"}))
    for stage, ratio in ((2, 0.5), (3, 1.0), (3, "auto")):
        given = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": ratio}, "zenflow": None}}
        assert deepspeed_config(section(zero_stage=stage, deepspeed=given))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_added_up_in_fp32(stage: int) -> None:
    """Unless the user says otherwise; and what is allowed is handed on."""
    assert deepspeed_config(section(zero_stage=stage))["data_types"]["grad_accum_dtype"] == "fp32"
    own = {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"overlap_comm": stage > 1}}
    found = deepspeed_config(section(zero_stage=stage, deepspeed=own))
    assert found["data_types"]["grad_accum_dtype"] == "bf16"
    assert found["zero_optimization"]["overlap_comm"] is (stage > 1)


def test_what_is_switched_off_is_no_contradiction() -> None:
    """Each key that has a place of its own, and others."""
    for key in (*OURS, "data_efficiency"):
        with pytest.raises(MismatchError, match=key) as error:
            deepspeed_config(section(deepspeed={key: {"enabled": True}}))
        assert OURS.get(key, "one of ") in str(error.value)
        assert key not in deepspeed_config(section(deepspeed={key: {"enabled": False}}))


def test_presets_by_name_agree_with_the_stage() -> None:
    """Each is taken at its own stage and contradicts every other, and `train.zero_stage` is named."""
    for name, content in DEEPSPEED_PRESETS.items():
        own = content["zero_optimization"]["stage"]
        for stage in (1, 2, 3):
            train = section(zero_stage=stage, deepspeed=name)
            assert train.deepspeed == content
            if stage == own:
                found = deepspeed_config(train)["zero_optimization"]
                assert found["stage"] == own
                assert ("offload_param" in found) == (name == "zero3_offload")
            else:
                with pytest.raises(MismatchError, match=r"zero_optimization\.stage contradicts train\.zero_stage"):
                    deepspeed_config(train)


def test_the_stage_is_that_of_deepspeeds_settings_where_it_is_not_said() -> None:
    """By name or as a mapping; what is wrong with them is told as before."""
    for name, content in DEEPSPEED_PRESETS.items():
        for given in (name, content):
            train = TrainSection.model_validate({"output": "runs/x", "deepspeed": given})
            assert train.zero_stage == content["zero_optimization"]["stage"]
            assert TrainSection.model_validate_json(train.model_dump_json()) == train
    for given in (
        {},
        {"zero_optimization": {"stage": "auto"}},
        {"zero_optimization": {"stage": 7}},
        {"zero_optimization": 3},
    ):
        assert TrainSection.model_validate({"output": "runs/x", "deepspeed": given}).zero_stage == 2
    with pytest.raises(ValidationError, match="none of zero1"):
        TrainSection.model_validate({"output": "runs/x", "deepspeed": "zero4"})


def test_a_path_is_read_once_and_becomes_its_content(tmp_path: Path) -> None:
    """What is handed to the workers needs no other file."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 7}}')
    train = section(deepspeed=str(file))
    file.unlink()
    again = TrainSection.model_validate_json(train.model_dump_json())
    assert again.deepspeed == {"zero_optimization": {"reduce_bucket_size": 7}}
    assert deepspeed_config(again)["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize(("text", "says"), [(None, "none of zero1"), ("{", "JSON file"), ("[1]", "not a JSON object")])
def test_a_path_that_cannot_be_used_is_told(tmp_path: Path, text: str | None, says: str) -> None:
    """Missing, torn, or another shape."""
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValidationError, match=says):
        section(deepspeed=str(file))
