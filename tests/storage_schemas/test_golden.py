"""Dumps that were written by an earlier version of this code stay readable, bit by bit."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from storage_schemas.canonical import FORMAT_VERSION
from storage_schemas.reader import Dump
from storage_schemas.rows import SCHEMA, STATUSES
from storage_schemas.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden"
FORMAT = (Path(__file__).parent.parent.parent / "docs" / "format.md").read_text()


@pytest.mark.parametrize("estimator", ["topk", "adaptive", "sampled"])
@pytest.mark.parametrize("writers", ["", "-first", "-content"])
def test_the_golden_dump_reads_as_it_did(writers: str, estimator: str) -> None:
    spec = importlib.util.spec_from_file_location("regenerate", GOLDEN / "regenerate.py")
    assert spec is not None
    assert spec.loader is not None
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    folder = GOLDEN / f"v{FORMAT_VERSION}{writers}"
    assert verify(str(folder / estimator)).ok
    expected = json.loads((folder / f"{estimator}.json").read_text())
    assert regenerate.contents(Dump.open(str(folder / estimator))) == expected
    assert {row["status"] for row in expected} >= {"ok", "nonfinite", "empty"}


def test_the_written_format_names_every_column_and_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", FORMAT.split("## 4.")[1].split("## 5.")[0], re.MULTILINE))
    assert list(rows) == SCHEMA.names
    for field in SCHEMA:
        assert rows[field.name] == re.sub("element: | not null", "", str(field.type)), field.name
    for status in STATUSES:
        assert f"`{status}`" in FORMAT
    assert f"`format_version` is {FORMAT_VERSION}." in FORMAT
