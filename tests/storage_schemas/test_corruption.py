"""Damaged files: not one is accepted, whatever is damaged, wherever, however."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.dumps import make_dump, record_of, some_provenance

from storage_schemas import codec
from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.footer import claimed_values
from storage_schemas.reader import Dump, parse_unit
from storage_schemas.records import TOKENIZER, record_key
from storage_schemas.verify import verify

KINDS = ["shard", "record", "seal", "manifest", "run", "tokenizer", "tokenizer record"]
REFUSED = (DataError, MismatchError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dump")
    make_dump(found)
    return found


def path_of(folder: Path, kind: str) -> Path:
    record = record_of(folder, 0)
    return {
        "shard": folder / record.file,
        "record": folder / record_key(0),
        "seal": folder / "SEALED.json",
        "manifest": next(folder.glob("manifest-*")),
        "run": folder / "run.json",
        "tokenizer": folder / "tokenizer" / "tokenizer.json",
        "tokenizer record": folder / TOKENIZER,
    }[kind]


def read(folder: Path, kind: str) -> None:
    """What a trainer does; records are read as by a follower, who sees no seal yet."""
    dump = Dump.open(str(folder))
    if kind in ("record", "tokenizer record"):
        dump.read_seal = lambda: None  # type: ignore[method-assign]
    dump.read_records()
    dump.read_unit(0)
    dump.read_tokenizer()


def damaged(folder: Path, kind: str, versions: Iterator[bytes]) -> int:
    """Put each version in the place of the file; all must be refused. How many there were."""
    path = path_of(folder, kind)
    original = path.read_bytes()
    n = 0
    try:
        for version in versions:
            if version == original:
                continue
            path.write_bytes(version)
            n += 1
            with pytest.raises(REFUSED):
                read(folder, kind)
    finally:
        path.write_bytes(original)
    read(folder, kind)
    return n


def flips(data: bytes, n: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(n):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def cuts(data: bytes, n: int) -> Iterator[bytes]:
    step = max(1, len(data) // n)
    yield from (data[:length] for length in range(0, len(data), step))
    yield from (data[:-length] for length in range(1, 20))


def other_damage(data: bytes, other: bytes) -> Iterator[bytes]:
    """Appended and repeated content, zeroed and swapped blocks of several sizes, another unit's file."""
    yield from (data + b"\0", data + b"\n", data + data, other + data, data + other, other, b"\0" * len(data))
    yield from (data[1:], data[::-1], b"")
    for size in (1, 16, 512, 4096):
        blocks = [data[i : i + size] for i in range(0, len(data), size)]
        for i in range(0, len(blocks), max(1, len(blocks) // 8)):
            j = (i + len(blocks) // 2) % len(blocks)
            yield b"".join([*blocks[:i], b"\0" * len(blocks[i]), *blocks[i + 1 :]])
            swapped = list(blocks)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            yield b"".join(swapped)
            yield b"".join([*blocks[:i], *blocks[i + 1 :]])


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(kind: str, folder: Path) -> None:
    assert damaged(folder, kind, flips(path_of(folder, kind).read_bytes(), 60, seed=1)) == 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_flipped_bits(kind: str, folder: Path) -> None:
    assert damaged(folder, kind, flips(path_of(folder, kind).read_bytes(), 3000, seed=2)) == 3000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["record", "seal", "run"])
def test_every_flipped_bit(kind: str, folder: Path) -> None:
    data = path_of(folder, kind).read_bytes()
    every = (
        data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)
    )  # fmt: skip
    assert damaged(folder, kind, every) == 8 * len(data)


@pytest.mark.parametrize("kind", KINDS)
def test_truncations(kind: str, folder: Path) -> None:
    assert damaged(folder, kind, cuts(path_of(folder, kind).read_bytes(), 40)) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation(kind: str, folder: Path) -> None:
    data = path_of(folder, kind).read_bytes()
    assert damaged(folder, kind, cuts(data, 2500)) >= min(len(data), 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_files_in_the_wrong_place(kind: str, folder: Path) -> None:
    data = path_of(folder, kind).read_bytes()
    other = record_of(folder, 1)
    foreign = {"shard": (folder / other.file).read_bytes(), "record": other.to_json()}.get(kind, b"{}")
    assert damaged(folder, kind, other_damage(data, foreign)) > 40


def test_verify_finds_every_kind(folder: Path) -> None:
    for kind in KINDS[:-1]:  # Once there is a seal, it names the tokenizer's files.
        path = path_of(folder, kind)
        original = path.read_bytes()
        at = len(original) // 2
        path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        try:
            assert not verify(str(folder)).ok, kind
        except REFUSED:
            assert kind == "run"
        finally:
            path.write_bytes(original)
    assert verify(str(folder)).ok


def parse(folder: Path, versions: Iterator[bytes]) -> tuple[int, int]:
    """Parse a shard without looking at its size and hash: how many versions were refused, and how many there were."""
    provenance = some_provenance()
    record = record_of(folder, 0)
    refused = n = 0
    for version in versions:
        n += 1
        try:
            parse_unit(version, record.model_copy(update={"bytes": len(version)}), provenance, name="shard")
        except REFUSED:
            refused += 1
    return refused, n


def page_flips(data: bytes, n: int, seed: int) -> Iterator[bytes]:
    """Flips in the column data."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    yield from (changed + data[footer:] for changed in flips(data[:footer], n, seed))


def test_without_the_hash_damage_is_refused_or_harmless(folder: Path) -> None:
    """The second line of defence: page checksums and the rules of the format; never another exception."""
    data = path_of(folder, "shard").read_bytes()
    refused, n = parse(folder, page_flips(data, 300, seed=3))
    assert refused >= 0.65 * n, "half without page checksums; the rest of such a small file are statistics and indices"
    refused, n = parse(folder, cuts(data, 60))
    assert refused == n


@pytest.mark.slow
def test_without_the_hash_nothing_crashes(folder: Path) -> None:
    refused, n = parse(folder, page_flips(path_of(folder, "shard").read_bytes(), 3000, seed=4))
    assert n == 3000
    assert refused >= 0.65 * n


GOLDEN = Path(__file__).parent.parent / "golden"
ABORTING = {
    "v1": [(2973, 70)],
    "v1-first": [(2097, 18), (2143, 36), (2155, 52), (2767, 57), (2986, 57), (3243, 54), (3595, 70)],
}
"""Bytes of the footer of a golden shard, and values there, on which pyarrow alone ends the process: the first three of
the first writers' shard give a column other levels, the others give a column chunk a histogram of another length."""


def forged(shard: str, changes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Parse a golden shard with one byte changed, without its hash: how many were refused, and of how many."""
    dump = Dump.open(str(GOLDEN / shard / "topk"))
    record = dump.read_record(0)
    assert record is not None
    data = dump.store.get(record.file)
    refused = n = 0
    for place, value in changes:
        n += 1
        try:
            parse_unit(data[:place] + bytes([value]) + data[place + 1 :], record, dump.provenance, name="shard")
        except REFUSED:
            refused += 1
    return refused, n


@pytest.mark.parametrize("shard", ABORTING)
def test_footers_on_which_pyarrow_aborts_are_refused(shard: str) -> None:
    assert forged(shard, ABORTING[shard]) == (len(ABORTING[shard]), len(ABORTING[shard]))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ABORTING)
def test_no_change_of_a_footer_ends_the_process(shard: str) -> None:
    data = next((GOLDEN / shard / "topk" / "data").iterdir()).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    changes = [(i, value) for i in range(footer, len(data)) for value in ((data[i] + 16) % 256, data[i] ^ 1)]
    refused, n = forged(shard, changes)
    assert n == 2 * (len(data) - footer)
    assert refused >= 0.4 * n, "half of a footer are statistics"


NO_FOOTERS = {
    "none": (b"", "no Parquet footer"),
    "a long list": (b"\x19\xfc\xff\xff\xff\xff\x0f", "torn"),
    "nested": (b"\x1c" * 5000, "nested too deeply"),
    "a long number": (b"\x18" + b"\xff" * 12, "too long"),
    "an unknown type": (b"\x1d", "type 13"),
    "torn": (b"\x15", "torn"),
    "a number as row group": (b"\x49\x15\x02\0", "other types"),
    "a chunk without values": (b"\x49\x1c\x19\x1c\0\0\0", "no number of values"),
    "another number of columns": (b"\x49\x1c\x19\x0c\0\0", "has 0 columns"),
    "a chunk elsewhere": (b"\x49\x1c\x19\x1c\x18\x01x\x2c\x56\x02\0\0\0\0", "lies elsewhere"),
}
"""Compact Thrift: field 4 of the file holds row groups, field 1 of these chunks, field 3 of these the metadata."""


@pytest.mark.parametrize("case", NO_FOOTERS)
def test_footers_that_are_no_footers(case: str) -> None:
    def file(footer: bytes) -> bytes:
        return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"

    assert claimed_values(file(b"\x49\x1c\x19\x1c\x3c\x56\x02\0\0\0\0"), [(0, 0)]) == [1]
    footer, message = NO_FOOTERS[case]
    with pytest.raises(ValueError, match=message):
        claimed_values(file(footer), [(0, 0)])
    for wrong in (b"", b"PAR1", file(b"\0")[:-1] + b"E", file(b"\0")[1:]):
        with pytest.raises(ValueError, match="no Parquet footer"):
            claimed_values(wrong, [(0, 0)])


def test_a_footer_claims_what_pyarrow_reads_from_it(folder: Path) -> None:
    file = codec.open_parquet(path_of(folder, "shard").read_bytes())
    columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    claimed = claimed_values(path_of(folder, "shard").read_bytes(), codec.levels(file))
    assert claimed == [column.num_values for column in columns]
