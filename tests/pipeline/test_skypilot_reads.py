"""SkyPilot 0.14 reads the files of examples/skypilot: `make test-skypilot`. Nothing is launched, no server runs."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skypilot,
    pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed"),
]


def read(config: dict[str, Any]) -> Any:
    import sky

    return sky.Task.from_yaml_config(config)


def written(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"examples/skypilot/{stage}.sky.yaml").read_text())
    return found


@pytest.mark.parametrize(("stage", "nodes", "gpus"), [("dump", 4, 1), ("train", 2, 8)])
def test_the_file_is_a_task(stage: str, nodes: int, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import sky

    monkeypatch.chdir(ROOT)
    task = sky.Task.from_yaml(f"examples/skypilot/{stage}.sky.yaml")
    assert task.num_nodes == nodes
    assert task.resources
    for resources in task.resources:
        assert list(resources.accelerators.values()) == [gpus]
        assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert set(task.envs) == set(written(stage)["envs"])
    assert task.run == written(stage)["run"]


def test_job_recovery_knows_its_keys() -> None:
    """A client of SkyPilot lets unknown keys of this mapping pass, so a typo would be silent."""
    from sky.utils import schemas

    known = schemas.get_resources_schema()["properties"]["job_recovery"]["anyOf"][1]["properties"]
    for stage in ("dump", "train"):
        assert written(stage)["resources"]["job_recovery"].keys() <= known.keys()


def test_the_volume_is_one() -> None:
    from sky.utils import schemas, validator

    volume = yaml.safe_load((ROOT / "examples/skypilot/runs.volume.yaml").read_text())
    schema = validator.get_schema_validator()(schemas.get_volume_schema())
    schema.validate(volume)


@pytest.mark.parametrize(
    "typo", [{"num_node": 4}, {"resources": {"accelerator": "H100:8"}}, {"secret": {}}, {"volume": {}}]
)
def test_a_typo_is_refused(typo: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(typo))):
        read(written("train") | typo)
