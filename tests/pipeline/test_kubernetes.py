"""The Kubernetes manifests: what the API's schema allows, and beyond it that their parts fit each other and the code.

No cluster runs them here. What a Job does after a failed pod is computed from its podFailurePolicy as the API's
reference states it: the first rule that fits decides, and without one the failure counts.
"""

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from support.command_lines import parameters
from support.kubernetes_jobs import action, objects

from pipeline.config import load_config
from pipeline.launch import Nodes, Placement, dump_placement, training_nodes
from storage_schemas.common.exits import Exit

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in (ROOT / "examples/kubernetes").glob("*.yaml")}
STAGES = ("dump", "train")
VERSIONS = ("1.29", kubernetes_validate.latest_version())
"""Oldest that the files say they need, and newest that the validator knows."""


def manifest(stage: str) -> dict[str, dict[str, Any]]:
    return objects(FILES[stage].read_text())


def validate(found: dict[str, dict[str, Any]], version: str) -> None:
    for one in found.values():
        kubernetes_validate.validate(one, version, strict=True)


def job_of(stage: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(stage)[f"Job/llm-neo-{stage}"]["spec"]
    return spec


def pod_of(stage: str) -> dict[str, Any]:
    pod: dict[str, Any] = job_of(stage)["template"]["spec"]
    return pod


def container_of(stage: str) -> dict[str, Any]:
    (container,) = pod_of(stage)["containers"]
    return dict(container)


def environment(stage: str, index: int) -> dict[str, str]:
    """Variables of a pod's container, as far as the manifest and the Job controller set them."""
    said = {variable["name"]: variable["value"] for variable in container_of(stage)["env"]}
    return said | {"JOB_COMPLETION_INDEX": str(index)}


def command_line(stage: str, index: int) -> list[str]:
    """What a pod runs, after `llm-neo`, with $(VARIABLE) expanded as the kubelet does."""
    container, env = container_of(stage), environment(stage, index)
    assert container["command"] == ["llm-neo"]
    return [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word) for word in container["args"]]


def test_there_is_one_manifest_per_stage() -> None:
    assert sorted(FILES) == sorted(STAGES)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_api_knows_every_field(stage: str, version: str) -> None:
    validate(manifest(stage), version)


@pytest.mark.parametrize(
    ("written", "typo"),
    [
        ("backoffLimitPerIndex:", "backoffLimitPerIndexes:"),
        ("completionMode: Indexed", "completionmode: Indexed"),
        ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 1m"),
        ("onExitCodes:", "onExitCode:"),
        ("secretRef:", "secretref:"),
        ("claimName:", "claim:"),
    ],
)
def test_a_typo_is_refused(written: str, typo: str) -> None:
    text = FILES["dump"].read_text()
    assert written in text
    found = objects(text.replace(written, typo))
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(found, VERSIONS[-1])


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_named_is_there(stage: str) -> None:
    found, pod, container = manifest(stage), pod_of(stage), container_of(stage)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in found
        if "configMap" in volume:
            assert f"ConfigMap/{volume['configMap']['name']}" in found
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    env = environment(stage, 0)
    assert "persistentVolumeClaim" in mounts[env["HF_HOME"]]
    assert "emptyDir" in mounts[env["HOME"]]
    secrets = [source["secretRef"]["name"] for source in container["envFrom"]]
    assert secrets == [{"dump": "llm-neo-teacher", "train": "llm-neo-student"}[stage]]
    assert f"kubectl create secret generic {secrets[0]}" in FILES[stage].read_text()
    # Secrets are made by hand: none lies in the manifest.
    assert not [name for name in found if name.startswith("Secret/")]
    assert not [name for name in env if re.search("KEY|TOKEN|SECRET", name)]


def test_both_clusters_may_be_one() -> None:
    """Objects of one name are equal in both files, so that applying one after the other changes nothing."""
    dump, train = manifest("dump"), manifest("train")
    shared = dump.keys() & train.keys()
    assert shared == {"ConfigMap/llm-neo", "PersistentVolumeClaim/llm-neo-models"}
    for name in shared:
        assert dump[name] == train[name]


@pytest.mark.parametrize("stage", STAGES)
def test_the_configuration_is_the_example_with_the_places_of_this_cluster(stage: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(manifest(stage)["ConfigMap/llm-neo"]["data"]["config.yaml"])
    found, example = load_config(file), load_config(ROOT / "examples/llama-8b-to-1b.yaml")
    assert found.train is not None
    assert example.train is not None
    places = {"output": found.train.output, "cache_dir": found.train.cache_dir}
    assert found == example.model_copy(update={"train": example.train.model_copy(update=places)})
    mounts = {mount["mountPath"]: mount["name"] for mount in container_of("train")["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of("train")["volumes"]}
    output, cache = (volumes[mounts[f"/{Path(str(place)).parts[1]}"]] for place in places.values())
    assert "persistentVolumeClaim" in output
    assert found.train.cache_bytes is not None
    assert int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30 > found.train.cache_bytes


@pytest.mark.parametrize("stage", STAGES)
def test_the_job_is_indexed_and_its_pods_never_restart_in_place(stage: str) -> None:
    """What the API demands of podFailurePolicy and backoffLimitPerIndex, and its schema does not say."""
    job, pod = job_of(stage), pod_of(stage)
    assert job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"
    # A limit of the whole Job would add up what workers, or pods that fail together, do.
    assert "backoffLimit" not in job
    script = (ROOT / f"examples/slurm/{stage}.sbatch").read_text()
    assert f"MAX_RESTARTS:-{job['backoffLimitPerIndex']}" in script
    # A time limit would end the Job for good.
    assert "activeDeadlineSeconds" not in job


@pytest.mark.parametrize("stage", STAGES)
def test_exit_codes_decide_as_they_are_meant(stage: str) -> None:
    policy = job_of(stage)["podFailurePolicy"]
    for code in set(Exit) - {Exit.DONE}:
        assert action(policy, code) == ("Count" if code == Exit.TEMPORARY else "FailJob"), code
        assert action(policy, code, ("DisruptionTarget",)) == "Ignore"
    for signal in (134, 135, 137, 143):
        assert action(policy, signal) == "Count"
    for rule in policy["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container_of(stage)["name"]
            assert rule["onExitCodes"]["values"] == sorted(set(rule["onExitCodes"]["values"]))


def test_a_policy_without_a_code_would_be_noticed() -> None:
    policy = copy.deepcopy(job_of("train")["podFailurePolicy"])
    policy["rules"][1]["onExitCodes"]["values"].remove(int(Exit.MISMATCH))
    assert action(policy, Exit.MISMATCH) == "Count"


def test_workers_of_stage_one_know_their_numbers() -> None:
    completions = job_of("dump")["completions"]
    assert job_of("dump")["parallelism"] == completions
    found = [dump_placement(environment("dump", index)) for index in range(completions)]
    assert found == [Placement(index, completions) for index in range(completions)]
    # The others go on without an index that has failed for good.
    assert "maxFailedIndexes" not in job_of("dump")
    given = parameters(command_line("dump", 0))
    assert (given["rank"], given["world_size"], given["workers"]) == (None, None, None)
    assert container_of("dump")["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_pods_of_stage_two_meet_at_the_one_with_index_0() -> None:
    found, job, pod, container = manifest("train"), job_of("train"), pod_of("train"), container_of("train")
    assert job["parallelism"] == job["completions"]
    assert job["maxFailedIndexes"] == 0
    service = found[f"Service/{pod['subdomain']}"]["spec"]
    labels = job["template"]["metadata"]["labels"].items()
    assert service["selector"].items() <= labels
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    policy = found["NetworkPolicy/llm-neo-train"]["spec"]
    (rule,) = policy["ingress"]
    for selector in (policy["podSelector"], *(peer["podSelector"] for peer in rule["from"])):
        assert selector["matchLabels"].items() <= labels
    # The hostname of an indexed Job's pod is <job>-<index>.
    for index in range(job["completions"]):
        given = parameters(command_line("train", index))
        nodes = training_nodes({}, given["nnodes"], given["node_rank"], given["rdzv_endpoint"])
        assert nodes == Nodes(job["completions"], index, f"llm-neo-train-0.{pod['subdomain']}:29500")
    (port,) = container["ports"]
    (exposed,) = service["ports"]
    assert port["containerPort"] == exposed["port"] == 29500
    assert exposed["targetPort"] == port["name"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_reads_the_mounted_configuration(stage: str) -> None:
    given = parameters(command_line(stage, 0))
    (mount,) = [mount for mount in container_of(stage)["volumeMounts"] if mount["name"] == "config"]
    (name,) = manifest(stage)["ConfigMap/llm-neo"]["data"]
    assert str(given["config"]) == f"{mount['mountPath']}/{name}"


def test_a_typo_in_the_command_is_refused() -> None:
    words = [word.replace("--nnodes", "--nodes") for word in command_line("train", 0)]
    with pytest.raises(Exception, match=r"No such option:? '?--nodes"):
        parameters(words)


def test_the_variant_with_a_teacher_of_70b(tmp_path: Path) -> None:
    """The two lines that the manifest tells to uncomment."""
    text, count = re.subn(r"^( +)# - --set=", r"\1- --set=", FILES["dump"].read_text(), flags=re.MULTILINE)
    assert count == 2
    found = objects(text)
    (container,) = found["Job/llm-neo-dump"]["spec"]["template"]["spec"]["containers"]
    file = tmp_path / "config.yaml"
    file.write_text(found["ConfigMap/llm-neo"]["data"]["config.yaml"])
    config = load_config(file, parameters(container["args"])["overrides"])
    assert config.teacher is not None
    assert config.teacher.model == "meta-llama/Llama-3.1-70B-Instruct"
    assert config.teacher.grouped


@pytest.mark.parametrize(("stage", "seconds"), [("dump", 60), ("train", 300)])
def test_there_is_time_to_stop(stage: str, seconds: int) -> None:
    assert pod_of(stage)["terminationGracePeriodSeconds"] == seconds
    # One shell between the kubelet and the command would keep its SIGTERM to itself.
    assert container_of(stage)["command"] == ["llm-neo"]
