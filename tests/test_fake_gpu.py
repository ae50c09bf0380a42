"""What runs on the GPU in both stages mixes no devices, reads no value, copies nothing back: on one without values."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.distributed import environment


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What each check of `support.fake_gpu` met, in a process of its own."""
    command = [sys.executable, "-m", "support.fake_gpu"]
    tests = Path(__file__).parent
    done = subprocess.run(command, cwd=tests, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_waits_for_the_gpu(found: dict[str, str]) -> None:
    checks = {name: error for name, error in found.items() if not name.startswith("planted")}
    assert {name.split(",")[0] for name in checks} == {"head", "student", "estimates", "teacher"}
    assert {name: error for name, error in checks.items() if error} == {}


def test_planted_mistakes_are_found(found: dict[str, str]) -> None:
    assert "two devices, gpu:0 and cpu" in found["planted: two devices"]
    assert "_local_scalar_dense" in found["planted: a read"]
    assert "gpu -> cpu" in found["planted: a copy"]
