"""A model with code of its own: a Llama whose MLP's output is halved, which no class of transformers does."""

import json
import sys
from pathlib import Path

import pytest

CONFIGURATION = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

FACTOR = 0.5


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.register_forward_hook(lambda module, _, output: FACTOR * output)
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def bring_code(folder: Path, auto_map: dict[str, str] = AUTO_MAP) -> Path:
    """Make the Llama in a directory such a model."""
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change_code(folder: Path) -> None:
    """Another number in it."""
    file = folder / "modeling_own.py"
    file.write_text(file.read_text().replace("FACTOR = 0.5", "FACTOR = 0.25"))


def forget_code(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A place of its own for what transformers copies and imports, as in a new process."""
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        patch.delitem(sys.modules, name)
    patch.setattr(sys, "path", [str(folder), *sys.path])
