"""Manifests of Kubernetes, and what a Job's podFailurePolicy makes of a failed pod."""

from typing import Any

import yaml


def objects(text: str) -> dict[str, dict[str, Any]]:
    """The objects of a manifest, by kind and name: `Job/llm-neo-dump`."""
    found = [document for document in yaml.safe_load_all(text) if document is not None]
    named = {f"{document['kind']}/{document['metadata']['name']}": document for document in found}
    assert len(named) == len(found)
    return named


def action(policy: dict[str, Any], code: int, conditions: tuple[str, ...] = ()) -> str:
    """What a Job does after a pod has failed with this exit code and under these conditions."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes is None:
            fits = any(pattern["type"] in conditions for pattern in rule["onPodConditions"])
        else:
            fits = (code in codes["values"]) == (codes["operator"] == "In")
        if fits:
            return str(rule["action"])
    return "Count"
