"""What the switch for deterministic kernels asks of torch, cuBLAS and flash attention."""

import os
from collections.abc import Iterator

import pytest
import torch

from storage_schemas.common.errors import explained
from storage_schemas.common.exits import Exit
from student_train.deterministic import ENVIRONMENT, set_deterministic


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards all is as before."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    set_deterministic(False)


def test_torch_refuses_what_has_no_fixed_order_and_the_message_names_the_setting() -> None:
    set_deterministic(True)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    told = explained(caught.value)
    assert told is not None
    assert told.exit_code == Exit.MISMATCH
    assert "train.deterministic" in told.what
    assert "put_" in str(told)
    set_deterministic(False)
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_the_environment_is_set_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    set_deterministic(False)
    assert not ENVIRONMENT.keys() & os.environ.keys()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_deterministic(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
