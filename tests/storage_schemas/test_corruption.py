"""Damaged files: not one is accepted, whatever is damaged, wherever, however."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.dumps import make_dump, some_provenance

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.reader import Dump, parse_unit
from storage_schemas.records import TOKENIZER, CommitRecord, record_key
from storage_schemas.verify import verify

KINDS = ["shard", "record", "seal", "manifest", "run", "tokenizer", "tokenizer record"]
REFUSED = (DataError, MismatchError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dump")
    make_dump(found)
    return found


def path_of(folder: Path, kind: str) -> Path:
    record = CommitRecord.from_json((folder / record_key(0)).read_bytes(), name="record")
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
        dump.seal = lambda: None  # type: ignore[method-assign]
    dump.records()
    dump.read_unit(0)
    dump.tokenizer_files()


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
    other = CommitRecord.from_json((folder / record_key(1)).read_bytes(), name="record")
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
    """Parse a shard without looking at its hash: how many versions were refused, and how many there were."""
    provenance = some_provenance()
    record = CommitRecord.from_json((folder / record_key(0)).read_bytes(), name="record")
    refused = n = 0
    for version in versions:
        n += 1
        try:
            parse_unit(version, record, provenance, name="shard")
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
