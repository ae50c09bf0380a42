"""What `dump` and `verify` print for people: all of it, in words."""

from io import StringIO
from typing import Any

from rich.console import Console

from pipeline.views.summary import dump_lines, print_parts, verify_lines
from storage_schemas.verify import VerifyReport
from teacher_dump.dump import DumpSummary
from teacher_dump.recompute import RecomputeReport


def summary(**changes: Any) -> dict[str, Any]:
    values = {
        "url": "s3://bucket/\x1b[2Jdump",
        "fingerprint": "f" * 64,
        "units": 8,
        "units_done_here": 7,
        "units_lost_here": 1,
        "rows": 1256,
        "tokens": 26205,
        "supervised_tokens": 13140,
        "bytes": 1861596,
        "bytes_per_supervised_token": 141.67,
        "mean_kept_mass": 0.9468815487278982,
        "statuses": {"ok": 1250, "empty": 6},
        "truncated": 3,
        "tokens_here": 20000,
        "seconds": 83.4,
        "tokens_per_second": 239.8,
    }
    return DumpSummary.model_validate(values | changes).model_dump(mode="json")


def test_a_dump_and_its_held_out_samples_are_a_table_each() -> None:
    screen = StringIO()
    print_parts(dump_lines, summary() | {"heldout": summary(url="h", truncated=0)}, Console(file=screen, width=80))
    shown = screen.getvalue()
    first, second = shown.split("held-out samples")
    for part in ("1,256 (1,250 ok, 6 empty) in 8 units, 3 cut to", "13,140 of them supervised",
                 "141.7 per supervised", "0.9469 of the probability", "7 units, 1 more lost to a faster worker",
                 "20,000 tokens in 0:01:23", "240 tokens/s"):  # fmt: skip
        assert part in " ".join(first.split())
    assert "cut to" not in second
    assert "{" not in shown
    assert "\x1b" not in shown
    assert "…" not in shown


def test_where_all_is_drawn_no_coverage_is_claimed() -> None:
    assert dict(dump_lines(summary(mean_kept_mass=0.0)))["coverage"] == "none: every entry is drawn"


def test_a_dump_without_targets_and_without_work_says_so() -> None:
    lines = dict(dump_lines(summary(supervised_tokens=0, bytes_per_supervised_token=None, tokens_per_second=None)))
    assert lines["done here"] == "nothing: all was there"
    assert "bytes" not in lines


def test_a_verification_names_every_error_and_what_was_recomputed() -> None:
    found = VerifyReport(
        ok=False, sealed=True, units=3, rows=10, supervised_tokens=55, bytes=12345, errors=["unit 1: torn", "b\x07"],
        orphans=["data/x.parquet"],
    ).model_dump(mode="json")  # fmt: skip
    again = RecomputeReport(
        rows=[1, 5], supervised_tokens=12, kl=(1.5e-5,), kl_limit=3e-4, heads_equal=0.9876, draws_equal=0.5,
        corpus_compared=False, errors=[],
    ).model_dump(mode="json")  # fmt: skip
    lines = verify_lines("d", found | {"recompute": again})
    assert [value for name, value in lines if name == "error"] == ["unit 1: torn", "b\\x07"]
    told = dict(lines)
    assert told["verdict"] == "2 errors"
    assert told["recomputed"] == "2 rows, 12 supervised tokens"
    assert told["  KL"].startswith("1.5e-05 nats per token")
    assert told["  KL"].endswith("3.0e-04")
    assert (told["  same entries"], told["  same draws"]) == ("98.8% of the tokens", "50.0%")
    assert told["orphan"].startswith("data/x.parquet")
    good = found | {"ok": True, "errors": [], "orphans": []}
    assert dict(verify_lines("d", good))["verdict"] == "intact"
    assert (
        dict(verify_lines("d", good | {"ok": False, "sealed": False, "errors": ["x"]}))["verdict"]
        == "not sealed; 1 error"
    )
