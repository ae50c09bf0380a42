"""What a worker sees of the others: all of it in the end, whatever page it comes with."""

import random
import time
from collections.abc import Sequence

import pytest
from support.dumps import some_provenance

from storage_schemas.records import record_key
from storage_schemas.stores.store import Store
from storage_schemas.writer import DumpWriter
from teacher_dump import others
from teacher_dump.others import Others


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "LOOK_SECONDS", -1.0)


class Pages(Store):
    """Keys in memory, listed by pages of seven."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.asked: list[str] = []

    def list(self, prefix: str) -> list[str]:
        return list(self.keys)

    def list_after(self, key: str) -> tuple[Sequence[str], bool]:
        self.asked.append(key)
        page = sorted(each for each in self.keys if each > key)[:7]
        return page, len(page) == 7

    def size(self, key: str) -> int | None:
        self.asked.append(key)
        return 1 if key in self.keys else None

    def settle(self, folder: str) -> None:
        pass


def look(seen: Others, unit: int) -> None:
    seen.look(unit)
    while seen._answer is not None:
        time.sleep(0.0005)
        seen.look(unit)


@pytest.mark.parametrize("seed", range(3))
def test_everything_is_seen_within_a_round_and_the_unit_under_way_at_once(seed: int) -> None:
    draws = random.Random(seed)
    store = Pages()
    store.keys.add("commits/unit-zzz")
    writer = DumpWriter(store, some_provenance(samples=400))
    units = writer.provenance.units
    seen = Others(writer)
    while len(seen.committed) < units:
        new = draws.sample(range(units), draws.randint(0, 12))
        store.keys |= {record_key(unit) for unit in new}
        under_way = draws.randrange(units)
        store.asked.clear()
        look(seen, under_way)
        assert len(store.asked) <= 2
        assert seen.committed <= writer.committed()
        assert (under_way in seen.committed) == (record_key(under_way) in store.keys)
    before = seen.committed
    for _ in range(2):
        look(seen, 0)
    assert seen.committed == before == writer.committed()


def test_a_round_of_looks_sees_what_lies_in_gaps() -> None:
    store = Pages()
    writer = DumpWriter(store, some_provenance(samples=400))
    store.keys |= {record_key(unit) for unit in range(1, 100, 2)}
    seen = Others(writer)
    store.keys |= {record_key(unit) for unit in range(100)}
    for _ in range(15):
        look(seen, 0)
    assert seen.committed == set(range(100))
