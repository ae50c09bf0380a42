"""What makes two configurations the same run."""

from pathlib import Path
from typing import Any

import pytest
from support.engine_jobs import train_section
from support.tiny_student import write_dump

from storage_schemas.config import DumpSection
from storage_schemas.errors import MismatchError
from student_train.checkpoint import TrainState
from student_train.config import LoraSection, LossSection, StudentSection
from student_train.run import Run, _open_checkpoint, open_run
from student_train.stream import consumed_root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump."""
    folder = tmp_path_factory.mktemp("identity")
    write_dump(folder / "dump")
    return folder


def run_of(folder: Path, **lora: Any) -> Run:
    """A run of that adapter."""
    student = StudentSection(model="any", lora=LoraSection(r=4, **lora))
    return open_run(DumpSection(url=str(folder / "dump")), student, LossSection(), train_section(folder / "run"))


@pytest.mark.parametrize(("first", "then"), [(None, 8), (8.0, None), (None, None), (7.5, 7.5)])
def test_alpha_counts_by_its_value(first: float | None, then: float | None, folder: Path) -> None:
    """Null is 2 * r: a checkpoint of the one is resumed by the other, and by nothing else."""
    run = run_of(folder, alpha=first)
    state = TrainState(step=1, updates=1, consumed=consumed_root(run.dump, run.order, 1), identity=run.identity)
    run.checkpoints.save(state, [], keep=1)
    assert _open_checkpoint(run_of(folder, alpha=then), 1, verify=True).step == 1
    with pytest.raises(MismatchError, match=r"student\.lora\.alpha"):
        _open_checkpoint(run_of(folder, alpha=9), 1, verify=True)


def test_another_variant_is_another_run(folder: Path) -> None:
    """Also where the parameters have the same names."""
    assert run_of(folder).identity != run_of(folder, variant="rslora").identity
    assert run_of(folder).identity == run_of(folder, variant="lora").identity
