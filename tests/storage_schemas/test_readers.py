"""Other tools read a dump as plain ids and natural logs, and answer the same questions as this project's code."""

from pathlib import Path

import numpy as np
import pytest
from support.dumps import make_dump, some_provenance

from storage_schemas.config import Adaptive, Estimator, TopK
from storage_schemas.reader import Dump

SAMPLE, POSITION = 8, 0
"""Which target the second question asks for: a supervised token of a sample."""


@pytest.fixture(scope="module", params=[TopK(k=8), Adaptive(kind="adaptive", k_max=5)], ids=lambda e: e.kind)
def dump(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    estimator: Estimator = request.param
    folder = tmp_path_factory.mktemp("readers")
    make_dump(
        folder, some_provenance(estimator=estimator, temperatures=(1.0, 2.0) if estimator.kind == "topk" else (1.0,))
    )
    return Dump.open(str(folder))


def answers(dump: Dump) -> tuple[list[float], int]:
    """Mean entropy per unit, over head and tail bucket as stored, and the most probable token of the asked target."""
    means = []
    for unit in range(dump.provenance.units):
        targets = dump.read_unit(unit).targets
        entropies = [
            entropy(targets.logprobs[a : a + h], targets.tail_logprob[i, 0])
            for i, (a, h) in enumerate(zip(targets.offsets[:-1], targets.head_size, strict=True))
        ]
        means.append(float(np.mean(entropies)))
    unit, place = divmod(SAMPLE, dump.provenance.samples_per_unit)
    found = dump.read_unit(unit).row(place).targets
    assert found is not None
    one = found.slice(POSITION, POSITION + 1)
    return means, int(one.ids[one.logprobs.argmax()])


def entropy(head: object, tail: float | None) -> float:
    """Entropy in nats of a head and one bucket, from stored log-probs."""
    p = np.asarray(head, np.float64)
    bucket = 0.0 if tail is None or np.isneginf(tail) else np.exp(tail) * tail
    return float(-(np.exp(p) * p).sum() - bucket)


def check(dump: Dump, means: dict[str, float], token: int) -> None:
    """The answers of another tool, by file name, are those of this project."""
    expected, top = answers(dump)
    by_file = {Path(record.file).name: expected[unit] for unit, record in dump.read_records().items()}
    assert {Path(name).name for name in means} == set(by_file)
    for name, value in means.items():
        assert value == pytest.approx(by_file[Path(name).name], rel=1e-5), name
    assert token == top


def test_duckdb(dump: Dump) -> None:
    import duckdb

    files = f"{dump.store.url}/data/*.parquet"
    means = duckdb.sql(f"""
        WITH tokens AS (
            SELECT filename, unnest(target_logprobs) AS logprobs, unnest(head_size) AS head,
                   unnest(tail_logprob) AS tail
            FROM read_parquet('{files}', filename = true))
        SELECT filename, avg(-list_sum(list_transform(logprobs[1:head], lambda x: exp(x) * x))
                             - coalesce(exp(tail[1]) * tail[1], 0))
        FROM tokens GROUP BY filename
    """).fetchall()
    token = duckdb.sql(f"""
        SELECT target_ids[{POSITION + 1}][list_position(target_logprobs[{POSITION + 1}],
                                                        list_max(target_logprobs[{POSITION + 1}]))]
        FROM '{files}' WHERE sample_index = {SAMPLE}
    """).fetchall()[0][0]
    check(dump, dict(means), token)


def test_polars(dump: Dump) -> None:
    import polars as pl

    table = pl.scan_parquet(f"{dump.store.url}/data/*.parquet", include_file_paths="file").collect()
    tokens = (
        table.select("file", "target_logprobs", "head_size", "tail_logprob")
        .explode("target_logprobs", "head_size", "tail_logprob")
        .drop_nulls("head_size")
    )
    p = pl.element()
    tail = pl.col("tail_logprob").list.get(0)
    means = (
        tokens.with_columns(
            head=pl.col("target_logprobs").list.head("head_size").list.eval(p.exp() * p).list.sum(),
            bucket=(tail.exp() * tail).fill_null(0.0),
        )
        .group_by("file")
        .agg((-pl.col("head") - pl.col("bucket")).mean().alias("entropy"))
    )
    row = table.filter(pl.col("sample_index") == SAMPLE)
    logprobs, ids = row["target_logprobs"][0][POSITION], row["target_ids"][0][POSITION]
    check(dump, dict(means.iter_rows()), ids[logprobs.arg_max()])


def test_pandas(dump: Dump) -> None:
    import pandas as pd

    means, token = {}, None
    for path in sorted((Path(dump.store.url) / "data").glob("*.parquet")):
        frame = pd.read_parquet(path)
        columns = ["target_logprobs", "head_size", "tail_logprob"]
        tokens = frame[columns].explode(columns)
        tokens = tokens.dropna(subset="head_size")
        means[path.name] = float(
            np.mean([entropy(x[:h], t[0]) for x, h, t in tokens.itertuples(index=False)])
        )  # fmt: skip
        for row in frame[frame["sample_index"] == SAMPLE].itertuples():
            token = int(row.target_ids[POSITION][np.argmax(row.target_logprobs[POSITION])])
    check(dump, means, token)  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(dump: Dump, streaming: bool, tmp_path: Path) -> None:
    """The dump's own directory is a data set: the card in README.md says where its files are."""
    import datasets

    rows = datasets.load_dataset(dump.store.url, split="train", streaming=streaming, cache_dir=str(tmp_path))
    of_unit: dict[int, list[float]] = {}
    token, seen = None, []
    for row in rows:
        seen.append(row["sample_index"])
        if row["sample_index"] == SAMPLE:
            token = row["target_ids"][POSITION][int(np.argmax(row["target_logprobs"][POSITION]))]
        for head, size, tail in zip(row["target_logprobs"], row["head_size"], row["tail_logprob"], strict=True):
            unit = row["sample_index"] // dump.provenance.samples_per_unit
            of_unit.setdefault(unit, []).append(entropy(head[:size], tail[0]))
    assert sorted(seen) == list(range(dump.provenance.corpus.samples))
    records = dump.read_records()
    check(dump, {records[unit].file: float(np.mean(found)) for unit, found in of_unit.items()}, token)  # type: ignore[arg-type]


def test_the_query_on_the_card_works(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    monkeypatch.chdir(dump.store.url)
    query = Path("README.md").read_text().split("```sql")[1].split("```")[0]
    found = dict(duckdb.sql(query).fetchall())
    unit, place = divmod(SAMPLE, dump.provenance.samples_per_unit)
    targets = dump.read_unit(unit).row(place).targets
    assert targets is not None
    assert found[SAMPLE][0] == pytest.approx(float(np.exp(targets.slice(0, 1).logprobs.max())))
