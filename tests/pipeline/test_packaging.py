"""The package as it is installed: what is in it, what its messages point to, and what each part says that it lacks."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from support.command_lines import COMMANDS, Call

from pipeline.pages import page, pages
from pipeline.settings import schema
from storage_schemas.common import extras
from storage_schemas.common.exits import Exit
from student_train.config import TrainSection

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "teacher_dump", "student_train", "storage_schemas")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    extra: {Requirement(line).name for line in lines} for extra, lines in PROJECT["optional-dependencies"].items()
}
POINTERS = re.compile(r"(?<!https:/)/?\b(?:docs|examples)/[\w.*-]+")
PAGES_NAMED = re.compile(r"`llm-neo docs ([\w/]+)`")


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [(file, ast.parse(file.read_text())) for file in files]


def said(tree: ast.Module) -> Iterator[str]:
    """String literals that a program may print: all but docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_what_is_said_points_to_what_is_installed() -> None:
    """Messages, help, templates, recipes, and the schema with what it says of settings."""
    texts = {str(file): " ".join(said(tree)) for file, tree in trees()} | {"the schema": schema()}
    for pattern in ("**/*.jinja", "recipes/*.yaml"):
        texts |= {str(file): file.read_text() for package in PACKAGES for file in (ROOT / package).glob(pattern)}
    assert not {place: found for place, text in texts.items() if (found := POINTERS.findall(text))}
    named = {name for text in texts.values() for name in PAGES_NAMED.findall(text)}
    assert {"data_formats", "format", "serving"} <= named <= set(pages())


def test_pages_are_listed_and_printed(call: Call) -> None:
    code, out, _ = call("docs")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == set(pages())
    assert f"{'format':24} {(ROOT / 'docs/format.md').read_text().splitlines()[0][2:]}\n" in out
    assert call("docs", "design/teacher") == (0, (ROOT / "docs/design/teacher.md").read_text(), "")
    code, out, err = call("docs", "data_format")
    assert (code, out) == (Exit.USAGE, "")
    assert "did you mean data_formats?" in err


def test_a_checkout_without_links_says_so(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").write_text("../docs")
    monkeypatch.setattr("pipeline.pages.FOLDER", tmp_path / "docs")
    code, out, err = call("docs")
    assert (code, out) == (Exit.MISMATCH, "")
    assert "core.symlinks=true" in err


def asked_for() -> Iterator[tuple[str, list[str]]]:
    """Extras that code asks for, as far as they are written out, and the packages that it misses without them."""
    for _, tree in [*trees(), (ROOT, ast.parse((ROOT / "examples/demo/convert.py").read_text()))]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refuse_missing":
                extra = next(word.value for word in node.keywords if word.arg == "extra")
                if isinstance(extra, ast.Constant):
                    yield extra.value, [each.value for each in node.args[1:] if isinstance(each, ast.Constant)]


def test_every_extra_that_a_message_names_brings_what_is_missing() -> None:
    asked = [*asked_for(), ("train", list(extras.STAGE_TWO)), ("qlora", ["bitsandbytes"])]
    asked += [
        (tracker, [tracker]) for tracker in get_args(TrainSection.model_fields["report_to"].annotation)[0].__args__
    ]
    assert {extra for extra, _ in asked} == {"train", "vllm", "qlora", "tensorboard", "wandb", "report", "demo"}
    for extra, packages in asked:
        assert set(packages) <= EXTRAS[extra], extra
    assert not {"deepspeed", "peft"} & {Requirement(line).name for line in PROJECT["dependencies"]}


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["train", "x.yaml"], "`llm-neo train` needs deepspeed and peft"),
        (["run", "x.yaml"], "`llm-neo run` needs deepspeed and peft"),
        (["dump", "x.yaml", "--set", "teacher.sharding=zero3"], "teacher.sharding: zero3 needs deepspeed"),
        (["plan", "x.yaml", "--set", "teacher.sharding=zero3"], "teacher.sharding: zero3 needs deepspeed"),
        (["evaluate", "--model", "m", "--dump", "d"], "`llm-neo evaluate` needs peft"),
        (["chat", "m"], "`llm-neo chat` needs peft"),
        (["merge", "m", "out"], "`llm-neo merge` needs peft"),
        (["resize", "m", "out", "--dump", "d"], "`llm-neo resize` needs peft"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_what_needs_the_extra_train_says_so(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], missing: str
) -> None:
    monkeypatch.setattr(extras, "installed", lambda package: package not in extras.STAGE_TWO)
    monkeypatch.chdir(tmp_path)
    call("init", "smollm2-demo", "--out", "x.yaml")
    before = sorted(tmp_path.iterdir())
    code, out, err = call(*words)
    assert (code, out) == (Exit.MISMATCH, "")
    assert missing in err
    assert "pip install 'llm-neo[train]'" in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_the_dockerfiles_install_and_run_what_there_is(stage: str) -> None:
    text = (ROOT / f"examples/docker/{stage}.Dockerfile").read_text()
    assert "has not been built" in text
    steps = dict(line.split(" ", 1) for line in text.splitlines() if re.match("[A-Z]+ ", line))
    assert steps["COPY"] == ". /src"
    (install,) = re.findall("^RUN (pip install .*)$", text, re.MULTILINE)
    *options, target = install.split()[2:]
    assert options == ["--no-cache-dir", "--constraint", "/src/constraints.txt"]
    assert (ROOT / "constraints.txt").is_file()
    assert target == {"teacher": "/src", "student": "'/src[train]'"}[stage]
    named = [name for found in re.findall(r"/src\[([\w,]+)\]", text) for name in found.split(",")]
    assert set(named) <= set(EXTRAS)
    assert steps["ENTRYPOINT"] == f'["{next(iter(PROJECT["scripts"]))}"]'
    for command in re.findall(r"`llm-neo (\w+)`", text):
        assert command in COMMANDS
    job = {"teacher": "dump", "student": "train"}[stage]
    pod: dict[str, Any] = next(
        each for each in yaml.safe_load_all((ROOT / f"examples/kubernetes/{job}.yaml").read_text())
        if each["kind"] == "Job"
    )  # fmt: skip
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    assert f"--tag {container['image']} " in text
    assert f"--file examples/docker/{stage}.Dockerfile " in text


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("packaged")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "docs", "examples", "tests", "benchmarks", ".ci"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored, symlinks=True)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy(file, folder / "source")
    body = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    command = [sys.executable, "-c", body]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Built from the source distribution."""
    body = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(sdist.parent)!r}))"
    done = subprocess.run([sys.executable, "-c", body], cwd=sdist, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sdist.parent / done.stdout.splitlines()[-1]


def test_the_source_distribution_is_whole(sdist: Path) -> None:
    """With all that the project's own documents and tests need; links as the files that they lead to."""
    source = sdist.parent / "source"
    files = [
        file.relative_to(source) for folder in ("docs", "examples", "tests") for file in source.glob(f"{folder}/**/*")
    ]
    files += map(Path, ("Makefile", "CHANGELOG.md", "constraints.txt", ".ci/run", "pipeline/docs/format.md"))
    assert len(files) > 200
    for file in files:
        if (source / file).is_file():
            assert (sdist / file).is_file(), file
            assert not (sdist / file).is_symlink()
            assert (sdist / file).read_bytes() == (source / file).read_bytes()


def test_the_wheel_holds_code_recipes_and_pages_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        names = {name for name in held.namelist() if ".dist-info/" not in name}
        metadata = next(held.read(name).decode() for name in held.namelist() if name.endswith("/METADATA"))
    data = {name for name in names if not name.endswith((".py", "py.typed", ".jinja"))}
    recipes = {f"pipeline/recipes/{file.name}" for file in (ROOT / "pipeline/recipes").iterdir()}
    assert data == recipes | {f"pipeline/docs/{name}.md" for name in pages()}
    code = {str(file.relative_to(ROOT)) for file, _ in trees()}
    assert {name for name in names if name.endswith(".py")} == code
    assert "Project-URL: Paper, https://arxiv.org/abs/2411.06839" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert {f"Provides-Extra: {extra}" for extra in EXTRAS} <= set(metadata.splitlines())


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """From an empty directory; what it depends on is that of the environment that runs the tests."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    # pip must find this project nowhere else, or it takes it for installed.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    subprocess.run(install, env=env, check=True)
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    empty = tmp_path / "empty"
    empty.mkdir()

    def llm_neo(*words: str) -> str:
        command = [environment / "bin" / "llm-neo", *words]
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import pipeline; print(pipeline.__file__)"
    found = subprocess.run([python, "-c", where], cwd=empty, env=env, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(packages))
    assert llm_neo("--version") == f"llm-neo {PROJECT['version']}\n"
    assert "Stage one" in llm_neo("--help")
    assert "qwen3" in llm_neo("init")
    assert "doctor" in llm_neo("init", "qwen3")
    assert llm_neo("config", "schema") == schema()
    assert "train.output" in llm_neo("config", "show", "qwen3.yaml")
    assert llm_neo("docs", "format") == page("format")
    assert {file.name for file in empty.iterdir()} == {"qwen3.yaml", "llm-neo.schema.json"}


STAGE_ONE = """
import sys
from pathlib import Path
for package in ("deepspeed", "peft"):
    sys.modules[package] = None  # As if it were not installed.
sys.path.insert(0, {tests!r})
from support.dump_checks import write_corpus
from support.tiny_teachers import save_teacher
from pipeline import cli
save_teacher(Path("teacher"))
write_corpus(Path("corpus.jsonl"))
Path("x.yaml").write_text({config!r})
for words, code in {commands}:
    print(*words, flush=True)
    try:
        cli.main(words)
    except SystemExit as left:
        assert left.code == code, (words, left.code)
assert not any(name.startswith(("deepspeed.", "peft.")) for name in sys.modules)
"""
CONFIG = """
dump: {url: dump, samples_per_unit: 4}
teacher: {model: teacher, dtype: float32, device: cpu}
estimator: {kind: topk, k: 8}
corpus: {sources: [{path: corpus.jsonl}], max_length: 96, too_long: drop}
student: {model: teacher}
train: {output: run}
"""


@pytest.mark.slow
def test_stage_one_works_without_deepspeed_and_peft(tmp_path: Path) -> None:
    commands = [
        "config show x.yaml", "preview x.yaml", "plan x.yaml --pilot-samples 4", "dump x.yaml", "verify dump",
        "verify dump --recompute 2 --config x.yaml", "inspect dump --row 0 --html page.html", "status x.yaml",
        "doctor x.yaml", "prune teacher student --layers 1", "docs",
    ]  # fmt: skip
    words = [(command.split(), 0) for command in commands] + [(["train", "x.yaml"], 78)]
    body = STAGE_ONE.format(tests=str(ROOT / "tests"), config=CONFIG, commands=words)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pip install 'llm-neo[train]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_metadata_are_of_this_version() -> None:
    assert version("llm-neo") == PROJECT["version"]
    pythons = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")}
    assert PROJECT["requires-python"].removeprefix(">=") in pythons


def test_the_lowest_versions_are_those_that_are_allowed() -> None:
    """torch apart: the file says why."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    extra = (
        line
        for name in ("train", "demo", "report", "tensorboard", "wandb")
        for line in PROJECT["optional-dependencies"][name]
    )
    wanted = {one.name.lower(): one for one in map(Requirement, [*PROJECT["dependencies"], *extra]) if not one.extras}
    assert set(pinned) == set(wanted)
    for name, one in wanted.items():
        (floor,) = (each.version for each in one.specifier)
        assert name == "torch" or Version(pinned[name]).release[: len(Version(floor).release)] == Version(floor).release
    assert f"torch=={pinned['torch']}" in (ROOT / "constraints.txt").read_text()
