"""docs/clusters.md says what the files in examples/ and the code do."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_lines import parameters
from support.kubernetes_jobs import action, objects

from pipeline.config import load_config
from storage_schemas.common.exits import Exit
from storage_schemas.stores.requests import PATIENCE
from student_train.config import TrainSection
from student_train.model.student import LOGITS_BYTES
from student_train.world import COLLECTIVE_TIMEOUT

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/clusters.md").read_text()
EXAMPLE = ROOT / "examples/llama-8b-to-1b.yaml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def lines() -> Iterator[list[str]]:
    """The words of every command in the page's shell blocks."""
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose header begins with `first`."""
    table = PAGE.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    assert table, first
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def default(name: str) -> Any:
    return TrainSection.model_fields[name].default


def test_every_command_is_one() -> None:
    seen = set()
    for words in lines():
        if words[0] in ("llm-neo", "srun"):
            arguments = words[words.index("llm-neo") + 1 :]
            seen.add(arguments[0])
            parameters(arguments)
        elif words[0] == "sbatch":
            given = parameters([Path(words[1]).stem, *words[2:]])
            load_config(EXAMPLE, given["overrides"] or ())
            seen.add("sbatch")
        elif words[:2] in (["kubectl", "apply"], ["sky", "jobs"], ["sky", "volumes"]):
            (file,) = (word for word in words if word.endswith(".yaml"))
            assert (ROOT / file).is_file()
            seen.add(words[0])
    assert seen == {
        "init",
        "dump",
        "train",
        "freeze",
        "preview",
        "plan",
        "status",
        "verify",
        "evaluate",
        "merge",
        "doctor",
        "sbatch",
        "kubectl",
        "sky",
    }


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"No such option:? .?--modle"):
        parameters(["evaluate", "--modle", "a", "--dump", "b"])


def test_the_variables_of_skypilot_are_those_of_its_files() -> None:
    launched = [words for words in lines() if words[:3] == ["sky", "jobs", "launch"]]
    assert len(launched) == 4
    for words in launched:
        task = yaml.safe_load((ROOT / words[3]).read_text())
        assert {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--env"} <= set(task["envs"])
        # A secret without a value would end the launch.
        env = {"dump": "teacher.env", "train": "student.env"}[Path(words[3]).name.partition(".")[0]]
        assert words[4:6] == ["--secret-file", env]


def test_every_file_and_make_target_exists() -> None:
    for name in re.findall(r"\b(?:examples|tests|docs|pipeline)/[\w./-]+\.\w+", PAGE):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z-]+)", PAGE)
    assert {"test-skypilot", "dump-teacher", "train-student"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def slurm(code: int) -> bool:
    """Whether both scripts queue the job again."""
    scripts = [(ROOT / f"examples/slurm/{stage}.sbatch").read_text() for stage in ("dump", "train")]
    (again,) = {re.search(r'"\$code" -eq (\d+)', script)[1] for script in scripts}  # type: ignore[index]
    return code == int(again)


def kubernetes(code: int) -> bool:
    """Whether both Jobs start the index again."""
    jobs = (objects((ROOT / f"examples/kubernetes/{stage}.yaml").read_text()) for stage in ("dump", "train"))
    policies = [job["spec"]["podFailurePolicy"] for found in jobs for job in found.values() if job["kind"] == "Job"]
    (done,) = {action(policy, code) for policy in policies}
    return code != Exit.DONE and done != "FailJob"


def skypilot(code: int) -> bool:
    """Whether both managed jobs are recovered."""
    tasks = [yaml.safe_load((ROOT / f"examples/skypilot/{stage}.sky.yaml").read_text()) for stage in ("dump", "train")]
    return all(code in task["resources"]["job_recovery"]["recover_on_exit_codes"] for task in tasks)


def test_the_table_of_exit_codes_is_true() -> None:
    table = {int(row[0]): row[2:] for row in rows("code")}
    assert set(table) == {int(code) for code in Exit} | {137}
    for code, cells in table.items():
        for cell, again in zip(cells, (slurm(code), kubernetes(code), skypilot(code)), strict=True):
            assert re.split(r"\W", cell)[0] == ("again" if again else "ends"), (code, cell)


def test_limits_and_times_are_those_of_the_code() -> None:
    for stage, seconds in (("dump", 180), ("train", 300)):
        script = (ROOT / f"examples/slurm/{stage}.sbatch").read_text()
        assert "MAX_RESTARTS:-50" in script
        assert f"--signal=TERM@{seconds}\n" in script
    assert "three minutes before the time limit of a dump and five minutes before that of a training" in PAGE
    assert "again, up to 50 times (`MAX_RESTARTS`)" in PAGE
    assert f"`train.data_wait_seconds` ({default('data_wait_seconds'):.0f})" in PAGE
    assert f"`train.shuffle_window_units` long, {default('shuffle_window_units'):,} by default" in PAGE
    assert f"`train.cache_bytes` ({default('cache_bytes') // 2**30} GiB)" in PAGE
    assert (PATIENCE.total_seconds(), COLLECTIVE_TIMEOUT.total_seconds()) == (120, 600)
    assert "each request is repeated for two minutes" in PAGE
    assert "waits up to ten minutes for the others" in " ".join(PAGE.split())


def test_the_worked_example_adds_up() -> None:
    config = load_config(EXAMPLE)
    assert config.train is not None
    assert config.student is not None
    samples, tokens, bytes_each, entries = 10_000, 300, 88, 62
    unit = config.dump.samples_per_unit
    units = -(-samples // unit)
    # Llama-3.2-1B: hidden size 2048, 8 key-value heads of 64, 8192 in the MLP, 16 layers, 1.24 billion parameters.
    inputs_and_outputs = 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
    trained = config.student.lora.r * inputs_and_outputs
    ranks = config.train.global_batch_size // config.train.micro_batch_size
    expected = {
        "units": f"{units}",
        "workers": f"8 to {units // 4}",
        "size of the dump": f"3.0 million x 88 = {samples * tokens * bytes_each / 1e6:.0f} MB",
        "size of a shard": f"{samples * tokens * bytes_each / units / 1e6:.1f} MB",
        "GPU memory of a rank, frozen": f"{1.24e9 * 2 / 1e9:.1f} GB",
        "trained parameters of LoRA": f"128 x {inputs_and_outputs:,} = {trained / 1e6:.0f} million",
        "GPU memory of a rank, trained": f"{trained * 6 / 1e9:.2f} GB and {trained * 12 / ranks / 1e9:.2f} GB",
        "logits of a rank": f"{LOGITS_BYTES / 1e9:.2f} GB",
        "a checkpoint": f"{trained * 12 / 1e9:.1f} GB",
        "disk of a node, for decoded shards (memory of a rank, if there is only one)": (
            f"{2 * config.train.shuffle_block_units * unit * tokens * entries * 8 / 1e9:.1f} GB"
        ),
        "steps": f"{-(-samples // config.train.global_batch_size) * config.train.epochs}",
        "ranks with full micro-batches": f"{ranks}",
    }
    found = {row[0]: row[2] for row in rows("what | formula")}
    assert {name: found[name] for name in expected} == expected
    assert f"has {units} units" in " ".join(PAGE.split())
    assert f"in units of {unit}" in PAGE


def test_the_policy_is_what_the_table_of_rights_says() -> None:
    (block,) = blocks("json")
    allowed = {right for statement in json.loads(block)["Statement"] for right in statement["Action"]}
    teacher, student = ({row[0].strip("`") for row in rows("right on S3") if row[i] != "no"} for i in (1, 2))
    assert allowed == teacher
    assert student == {"s3:ListBucket", "s3:GetObject"}
