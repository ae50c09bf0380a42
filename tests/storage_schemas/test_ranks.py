"""What an error of a collective says to a scheduler."""

from pathlib import Path

import pytest

from storage_schemas.common import ranks
from storage_schemas.common.exits import Exit
from storage_schemas.common.ranks import ExitCodes, failed


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage\nDuplicate GPU detected: rank 1 and rank 0", 78),
        ("ncclSystemError: Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", 78),
        ("NCCL Error 1: unhandled cuda error, CUDA driver version is insufficient for CUDA runtime version", 78),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", 75),
        ("NCCL communicator was aborted on rank 0.", 75),
        ("[gloo] Connection closed by peer [127.0.0.1]:30", 75),
        ("mat1 and mat2 shapes cannot be multiplied", 70),
    ],
)
def test_what_never_mends_itself_is_not_run_again(
    said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "LOST_SECONDS", 0.1)
    assert failed(RuntimeError(said), ExitCodes(tmp_path, 0, 2), 0, memory="") == code
    told = capsys.readouterr().err
    assert ("--shm-size" in told) == (code == Exit.MISMATCH)
    assert ("has lost another rank" in told) == (code == Exit.TEMPORARY)
