"""What SECURITY.md promises of the code, read from the code: nothing is unpickled, and YAML is data alone."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "teacher_dump", "student_train", "storage_schemas")
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE = {"torch.load", "torch.jit.load", "os.system", "os.popen", "eval", "exec", "compile", "__import__"}
METHODS = {"read_pickle", "extractall"}
COLLECTIVES = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
"""Of torch.distributed: they take any object, which they pickle."""
SAFE_YAML = {
    "safe_load",
    "safe_dump",
    "SafeLoader",
    "YAMLError",
    "MarkedYAMLError",
    "Node",
    "ScalarNode",
    "MappingNode",
}
SAID = {"shell", "allow_pickle", "weights_only", "use_safetensors"}
MODELS = ("AutoModelForCausalLM", "PeftModel")
ALLOWED = {"teacher_dump/foreign/megatron.py": ["pickle", "torch.load"]}
"""What `llm-neo import megatron` is for: tensors alone (weights_only), and the class of the error that others raise."""


def faults(source: str) -> Iterator[str]:
    """What in a module could run code that a file or another process brings."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.split(".")[0] in PICKLES]
                # Under one name, by which its uses are known.
                found += [alias.name for alias in names if alias.name in ("yaml", "torch") and alias.asname]
            case ast.ImportFrom(module=module, names=names):
                found = [str(module)] if str(module).split(".")[0] in {*PICKLES, "yaml"} else []
                found += [alias.name for alias in names if module == "torch" and alias.name == "load"]
            case ast.Attribute(value=ast.Name("yaml"), attr=name) if name not in SAFE_YAML and name != "constructor":
                found = [f"yaml.{name}"]
            case ast.Call():
                found = list(_faults_of_call(node))
            case _:
                found = []
        yield from (f"line {getattr(node, 'lineno', '?')}: {name}" for name in found)


def _faults_of_call(call: ast.Call) -> Iterator[str]:
    function = _dotted(call.func)
    said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in SAID}
    if function in UNSAFE or function.rpartition(".")[2] in METHODS | COLLECTIVES:
        yield function
    yield from (name for name in ("shell", "allow_pickle") if said.get(name, "False") != "False")
    if said.get("weights_only", "True") != "True":
        yield "weights_only"
    loads = [function, *map(_dotted, call.args[:1])]
    if function.endswith(".from_pretrained") and any(name.startswith(MODELS) for name in loads):
        yield from [] if said.get("use_safetensors") == "True" else ["from_pretrained without use_safetensors"]


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a name; of anything else what is behind its last dot."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_dotted(value)}.{name}"
    return ""


def test_no_module_could_run_what_a_file_brings() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = {path.relative_to(ROOT).as_posix(): list(faults(path.read_text())) for path in files}
    told = {name: [each.partition(": ")[2] for each in lines] for name, lines in found.items() if lines}
    assert told == ALLOWED
    assert "weights_only=True" in (ROOT / "teacher_dump/foreign/megatron.py").read_text()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import torch; torch.load(f)", "from torch import load",
        "torch.jit.load(f)", "import torch as t", "np.load(f, allow_pickle=True)", "torch.load(f, weights_only=False)",
        "load(f, weights_only=flag)", "dist.all_gather_object(found, mine)", "dist.broadcast_object_list(found)",
        "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)", "from yaml import load", "import yaml as y",
        "class Mine(yaml.FullLoader): pass", "eval(text)", "exec(text)", "os.system(line)", "run(line, shell=True)",
        "archive.extractall(folder)", "AutoModelForCausalLM.from_pretrained(name)",
        "self.from_pretrained(AutoModelForCausalLM)", "PeftModel.from_pretrained(base, folder, use_safetensors=None)",
    ],
)  # fmt: skip
def test_what_is_looked_for_would_be_found(source: str) -> None:
    assert list(faults(source))


def test_the_hook_that_counts_unpickled_classes_hears_them(tmp_path: Path) -> None:
    """As the tests of whole runs use it: `test_run.py` and `test_group.py` find that there are none."""
    script = "import io, pickle; pickle.loads(pickle.dumps(io.BytesIO)); open('weights.bin', 'wb')"
    log = tmp_path / "audit.log"
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests/support/audit"), "LLM_NEO_AUDIT": str(log)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, timeout=60)
    started, unpickled, opened = log.read_text().splitlines()
    assert started.startswith("start ")
    assert "BytesIO" in unpickled
    assert "weights.bin" in opened
