"""What every test runs under: no network, no GPU unless asked for, one thread, shape checks on."""

import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.setdefault("DS_ACCELERATOR", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_CACHE = tempfile.TemporaryDirectory()
os.environ["LLM_NEO_CACHE"] = _CACHE.name
sys.path.insert(0, str(Path(__file__).parent))


def pytest_report_header() -> str:
    """Versions that results depend on."""
    packages = ("torch", "transformers", "peft", "deepspeed", "pyarrow", "obstore", "datasets")
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name))
