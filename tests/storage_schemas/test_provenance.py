"""Provenance: every difference from what a dump was made with is refused, with got, expected and what to do."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.dumps import HASH, some_provenance, unit_rows

from storage_schemas.canonical import canonical_json, leaves, parse_json
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.exits import Exit
from storage_schemas.config import Adaptive, Sampled, TopK
from storage_schemas.provenance import EngineIdentity, MadeBy, Provenance
from storage_schemas.reader import Dump
from storage_schemas.records import RUN
from storage_schemas.tokenizer import refuse_other_tokenizer, vocab_sha256
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter

OTHER = "f" * 64
DIFFERENCES = {
    "teacher.config_sha256": OTHER,
    "teacher.weights_sha256": {"model.safetensors": OTHER},
    "teacher.weights_sha256 more": {"model.safetensors": "0" * 64, "more.safetensors": OTHER},
    "teacher.weights_sha256 none": {},
    "teacher.dtype": "bfloat16",
    "teacher.head_size": 101,
    "tokenizer.vocab_size": 99,
    "tokenizer.vocab_sha256": OTHER,
    "tokenizer.chat_template_sha256": OTHER,
    "corpus.fingerprint": OTHER,
    "corpus.samples": 11,
    "corpus.mask": "all",
    "corpus.max_length": 129,
    "corpus.too_long": "drop",
    "samples_per_unit": 5,
    "estimator k": TopK(k=9),
    "estimator mass": TopK(k=8, mass=0.9),
    "estimator adaptive": Adaptive(kind="adaptive"),
    "estimator sampled": Sampled(kind="sampled"),
    "temperatures": (1.0, 2.0),
    "logsumexp": False,
    "logprob_step": 0.125,
    "max_kl": 1e-3,
    "engine.name": "vllm",
    "engine.arguments": {"quantization": "fp8"},
}


def changed(provenance: Provenance, field: str, value: object) -> Provenance:
    name = field.split(" ")[0]
    if "." not in name:
        return provenance.model_copy(update={name: value})
    section, leaf = name.split(".")
    leaf = {"head_size": "lm_head_rows"}.get(leaf, leaf)  # The stored name of the rows of the LM head.
    return provenance.model_copy(update={section: getattr(provenance, section).model_copy(update={leaf: value})})


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_difference_in_one_field_is_refused(field: str, tmp_path: Path) -> None:
    provenance = some_provenance()
    DumpWriter.open(str(tmp_path / "dump"), provenance)
    other = changed(provenance, field, DIFFERENCES[field])
    assert other.fingerprint != provenance.fingerprint
    with pytest.raises(MismatchError) as caught:
        DumpWriter.open(str(tmp_path / "dump"), other)
    error = caught.value
    assert error.exit_code == Exit.MISMATCH == 78
    assert field.split(" ")[0] in error.what
    assert error.got != error.expected
    assert error.fix
    assert "to do:" in str(error)
    assert (tmp_path / "dump" / RUN).read_bytes() == provenance.to_json()
    DumpWriter.open(str(tmp_path / "dump"), provenance)


def elsewhere(provenance: Provenance) -> Provenance:
    """The same content, made at another place with other versions."""
    made_by = MadeBy(model="hub/id", revision="a" * 40, config_file_sha256=OTHER, versions={"test": "2", "torch": "3"})
    return provenance.model_copy(update={"made_by": made_by})


def test_where_it_lies_and_which_versions_ran_it_are_a_note(tmp_path: Path) -> None:
    provenance = some_provenance()
    DumpWriter.open(str(tmp_path), provenance)
    other = elsewhere(provenance)
    assert other.fingerprint == provenance.fingerprint
    joined = DumpWriter.open(str(tmp_path), other)
    assert joined.provenance == provenance, "the first worker's note is kept"
    assert (tmp_path / RUN).read_bytes() == provenance.to_json()
    assert Dump.open(str(tmp_path)).provenance.origin.versions == {"test": "1"}


@pytest.mark.parametrize("estimator", ["topk", "adaptive", "sampled"])
@pytest.mark.parametrize("folder", ["v1", "v1-first"])
def test_a_dump_of_the_first_writers_is_continued_where_the_content_agrees(
    folder: str, estimator: str, tmp_path: Path
) -> None:
    golden = Path(__file__).parent.parent / "golden" / folder / estimator
    shutil.copytree(golden, tmp_path / "dump")
    old = Dump.open(str(golden)).provenance
    assert old.teacher.model == old.origin.model == "teacher"
    assert old.fingerprint == hashlib.sha256(canonical_json(json.loads((golden / RUN).read_bytes()))).hexdigest()
    now = some_provenance(
        samples=7, samples_per_unit=7, lm_head_rows=40, estimator=old.estimator, temperatures=old.temperatures
    )
    shutil.rmtree(tmp_path / "dump" / "commits")
    for path in (*(tmp_path / "dump" / "data").iterdir(), tmp_path / "dump" / "SEALED.json"):
        path.unlink()
    made_by = elsewhere(now).origin.model_copy(update={"config_file_sha256": HASH})
    wanted = now.model_copy(update={"made_by": made_by})
    writer = DumpWriter.open(str(tmp_path / "dump"), wanted)
    assert writer.provenance == old
    writer.commit_unit(0, unit_rows(writer.provenance, 0))
    assert writer.seal()
    assert verify(str(tmp_path / "dump")).ok
    for field, value in DIFFERENCES.items():
        if field != "teacher.config_sha256" and changed(wanted, field, value) != wanted:
            with pytest.raises(MismatchError):
                DumpWriter.open(str(tmp_path / "dump"), changed(wanted, field, value))
    with pytest.raises(MismatchError, match=r"teacher\.config_sha256"):
        DumpWriter.open(str(tmp_path / "dump"), elsewhere(now))


def test_arguments_of_an_engine_were_in_its_version_once() -> None:
    provenance = some_provenance()
    content = json.loads(provenance.to_json()) | {
        "engine": {"name": "test", "version": '1 with {"quantization": "fp8"}'}
    }
    del content["made_by"], content["checksum"]
    content["teacher"] |= {"model": "teacher", "revision": None}
    old = Provenance.from_json(canonical_json(content, indent=2), name="u/run.json")
    same = changed(provenance, "engine.arguments", {"quantization": "fp8"})
    assert old.differences_to(same) is None
    found = old.differences_to(provenance)
    assert found is not None
    assert found.keys == ["engine.arguments.quantization"]


def test_a_note_stands_in_one_place() -> None:
    content = json.loads(some_provenance().to_json())
    for other in (
        content | {"teacher": content["teacher"] | {"model": "teacher"}},
        {name: value for name, value in content.items() if name != "made_by"},
    ):
        with pytest.raises(DataError, match="either made_by"):
            Provenance.from_json(canonical_json(other, indent=2), name="u/run.json")
    note = content | {"made_by": content["made_by"] | {"model": "another"}}
    with pytest.raises(DataError, match="was changed"):
        Provenance.from_json(canonical_json(note, indent=2), name="u/run.json")


def test_the_table_covers_every_field() -> None:
    names = {field.split(" ")[0] for field in DIFFERENCES}
    for name, _ in leaves(some_provenance(engine=EngineIdentity(name="test", arguments={"a": 1})).content):
        assert name == "format_version" or any(name.startswith(covered) for covered in names), name
    assert len(DIFFERENCES) >= 25


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    DumpWriter.open(str(tmp_path), some_provenance())
    with pytest.raises(MismatchError, match=r"corpus\.samples, teacher\.dtype"):
        DumpWriter.open(
            str(tmp_path), changed(changed(some_provenance(), "corpus.samples", 3), "teacher.dtype", "float16")
        )


def test_fingerprint_depends_on_content_alone() -> None:
    provenance = some_provenance()
    again = Provenance.model_validate(dict(reversed(provenance.model_dump(mode="json").items())))
    assert again.fingerprint == provenance.fingerprint
    assert Provenance.from_json(provenance.to_json(), name="u/run.json") == again
    with pytest.raises(DataError, match="canonical"):
        Provenance.from_json(provenance.to_json() + b" ", name="u/run.json")


@pytest.mark.parametrize(
    ("version", "error"), [(2, MismatchError), (0, MismatchError), ("1", MismatchError), (None, MismatchError),
                           (True, MismatchError), (1, None)]
)  # fmt: skip
def test_other_versions_are_refused(version: object, error: type[Exception] | None, tmp_path: Path) -> None:
    content = json.loads(some_provenance().to_json()) | {"format_version": version}
    (tmp_path / RUN).write_bytes(canonical_json(content, indent=2))
    if error is None:
        assert Dump.open(str(tmp_path)).provenance == some_provenance()
        return
    with pytest.raises(error, match="format version") as caught:
        Dump.open(str(tmp_path))
    assert caught.value.expected == "1"
    with pytest.raises(error, match="format version"):
        DumpWriter.open(str(tmp_path), some_provenance())


HOSTILE_JSON = {
    "duplicate keys": b'{"format_version": 1, "format_version": 1}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "NaN": b'{"format_version": 1, "max_kl": NaN}',
    "not an object": b"[1]",
    "torn": some_provenance().to_json()[:-9],
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "unknown key": some_provenance().to_json().replace(b'"max_kl"', b'"min_kl"'),
    "infinite": some_provenance().to_json().replace(b'"max_kl": 0.0001', b'"max_kl": 1e999'),
}


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_run_json(case: str, tmp_path: Path) -> None:
    (tmp_path / RUN).write_bytes(HOSTILE_JSON[case])
    with pytest.raises((DataError, MismatchError), match=r"run\.json") as caught:
        Dump.open(str(tmp_path))
    assert caught.value.exit_code in (Exit.BAD_DATA, Exit.MISMATCH)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 1}', "duplicate key"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b" " * (64 * 2**20 + 1), "more than 64 MiB"),
    ],
    ids=["duplicate", "NaN", "infinity", "large"],
)
def test_json_with_two_meanings_or_without_end(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_json(data, name="x")


@pytest.mark.parametrize("size", [0, 2**31])
def test_vocabularies_end_below_two_to_the_31(size: int) -> None:
    content = json.loads(some_provenance().to_json())
    for section, field in (("teacher", "head_size"), ("tokenizer", "vocab_size")):
        changed_content = content | {section: content[section] | {field: size}}
        with pytest.raises(DataError, match=rf"{section}\.{field}"):
            Provenance.from_json(canonical_json(changed_content, indent=2), name="u/run.json")
    assert some_provenance(lm_head_rows=2**31 - 1).teacher.lm_head_rows == 2**31 - 1


def test_no_dump(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dump"):
        Dump.open(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_temperatures() -> None:
    provenance = some_provenance(temperatures=(1.0, 2.0))
    assert provenance.temperature_index(2.0) == 1
    with pytest.raises(MismatchError, match=r"\[1.0, 2.0\]"):
        provenance.temperature_index(3.0)
    with pytest.raises(MismatchError, match="temperature 1"):
        some_provenance(estimator=Sampled(kind="sampled"), temperatures=(1.0, 2.0)).temperature_index(2.0)


@given(st.integers(1, 1000), st.integers(1, 50))
def test_units_partition_the_samples(samples: int, per_unit: int) -> None:
    provenance = some_provenance(samples=samples, samples_per_unit=per_unit)
    assert [i for unit in range(provenance.units) for i in provenance.unit_range(unit)] == list(range(samples))


# Tokenizers


def vocabulary(size: int) -> dict[str, int]:
    return {f"token {i}": i for i in range(size)}


@pytest.mark.parametrize(
    ("dump", "student", "head"),
    [
        (100, 100, 100),
        (100, 100, 128),
        (100, 98, 128),
        (98, 100, 128),
        (90, 100, 90),
        # One tokenizer of 151,665 tokens: dumped by a head of 152,064 rows, trained with 151,936, or the reverse.
        (151_665, 151_665, 151_936),
        (151_665, 151_665, 152_064),
    ],
)
def test_padded_and_longer_vocabularies_are_the_same_tokenizer(dump: int, student: int, head: int) -> None:
    refuse_other_tokenizer(vocabulary(dump), vocabulary(student), student_head=head)


def swapped(size: int) -> dict[str, int]:
    return vocabulary(size) | {"token 3": 4, "token 4": 3}


@pytest.mark.parametrize(
    ("student", "head", "message"),
    [
        (swapped(100), 128, "3: teacher 'token 3', student 'token 4'"),
        ({f"other {i}": i for i in range(100)}, 128, "100 of 100"),
        ({}, 128, "0 of 0"),
        (vocabulary(100), 99, "head is smaller"),
        ({token: i for token, i in vocabulary(100).items() if i != 50}, 128, "50: teacher 'token 50', student None"),
    ],
)
def test_other_tokenizers_are_refused(student: dict[str, int], head: int, message: str) -> None:
    with pytest.raises(MismatchError, match=message) as caught:
        refuse_other_tokenizer(vocabulary(100), student, student_head=head)
    assert caught.value.fix


def test_conflicts_are_shown_up_to_five() -> None:
    with pytest.raises(MismatchError) as caught:
        refuse_other_tokenizer(vocabulary(100), {f"x{i}": i for i in range(100)}, student_head=100)
    assert str(caught.value.got).count("student") == 5


def test_vocabulary_hash_sees_every_pair_and_no_order() -> None:
    forward = vocabulary(50)
    assert vocab_sha256(forward) == vocab_sha256(dict(reversed(forward.items())))
    assert vocab_sha256(forward) != vocab_sha256(swapped(50))
    assert vocab_sha256(forward) != vocab_sha256(vocabulary(51))
    assert len({vocab_sha256({"\ud800": 0}), vocab_sha256({"\ud801": 0})}) == 2
