"""The same dump and the same protocol on object stores: a real one, moto's, and a tiny one with injected faults."""

import hashlib
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from support.dumps import TOKENIZER, make_dump, some_provenance, unit_rows
from support.races import race
from support.s3_proxy import Proxy
from support.s3_servers import BUCKET, READER, TinyS3, be_impatient, free_ports, moto, options, seaweedfs, tls

from storage_schemas.common.errors import DataError, MismatchError, TemporaryError
from storage_schemas.common.exits import Exit
from storage_schemas.reader import Dump
from storage_schemas.records import TokenizerRecord, record_key
from storage_schemas.stores import requests as remote
from storage_schemas.stores.store import Store
from storage_schemas.verify import verify
from storage_schemas.writer import DumpWriter
from teacher_dump import others

URL = f"s3://{BUCKET}/dumps/a"
WRONG = {"access_key_id": "testkey", "secret_access_key": "wrong"}


@pytest.fixture(autouse=True)
def no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost,no-such-host.invalid")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up within a second."""
    be_impatient(monkeypatch)


@pytest.fixture(scope="module")
def moto_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with moto(tmp_path_factory.mktemp("moto")) as port:
        yield port


@pytest.fixture(scope="module")
def seaweed_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as port:
        yield port


@pytest.fixture
def tiny() -> Iterator[TinyS3]:
    server = TinyS3()
    yield server
    server.close()


def whole_dump(url: str, given: dict[str, str], cache: Path) -> None:
    provenance = make_dump(url, options=given)
    report = verify(url, options=given)
    assert report.ok, report.errors
    dump = Dump.open(url, options=given, cache_dir=cache)
    assert dump.read_tokenizer() == TOKENIZER
    assert [len(dump.read_unit(unit)) for unit in dump.read_records()] == [4, 4, 2]
    assert DumpWriter.open(url, provenance, options=given).commit_unit(0, unit_rows(provenance, 0)) is None
    other = provenance.model_copy(update={"teacher": provenance.teacher.model_copy(update={"dtype": "float16"})})
    with pytest.raises(MismatchError, match=r"teacher\.dtype"):
        DumpWriter.open(url, other, options=given)
    files = Store(url, options=given)
    assert len(files.list("data")) == 3, "the loser removed its file"
    assert files.list("probe") == []
    with pytest.raises(DataError, match="no dump"):
        Dump.open(url + "-elsewhere", options=given)


def test_a_dump_on_moto(moto_port: int, tmp_path: Path) -> None:
    whole_dump(f"s3://{BUCKET}/whole", options(moto_port), tmp_path)


def test_a_dump_on_seaweedfs(seaweed_port: int, tmp_path: Path) -> None:
    whole_dump(f"s3://{BUCKET}/whole", options(seaweed_port), tmp_path)


def test_eight_writers_race_on_moto(moto_port: int) -> None:
    keys = [f"commits/unit-{i}" for i in range(10)]
    race(f"s3://{BUCKET}/race", 8, keys, start="spawn", options=options(moto_port))


def test_four_writers_race_on_seaweedfs(seaweed_port: int) -> None:
    keys = [f"commits/unit-{i}" for i in range(3)]
    race(f"s3://{BUCKET}/race", 4, keys, start="spawn", options=options(seaweed_port))


def test_a_reader_needs_no_right_to_write(seaweed_port: int, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/shared"
    provenance = make_dump(url, options=options(seaweed_port))
    given = options(seaweed_port, READER)
    assert verify(url, options=given).ok
    assert len(Dump.open(url, options=given, cache_dir=tmp_path).read_unit(0)) == 4
    with pytest.raises(MismatchError, match="no access") as caught:
        DumpWriter.open(url + "-new", provenance, options=given)
    assert caught.value.exit_code == Exit.MISMATCH


def test_wrong_credentials_are_a_configuration_error(seaweed_port: int) -> None:
    given = options(seaweed_port, WRONG)
    for call in (
        lambda: Dump.open(URL, options=given),
        lambda: DumpWriter.open(URL, some_provenance(), options=given),
        lambda: Store(URL, options=given).list("data"),
        lambda: Store(URL, options=given).put_new("x", b"1"),
    ):
        with pytest.raises(MismatchError, match="no access") as caught:
            call()
        assert caught.value.exit_code == Exit.MISMATCH == 78
        assert "credentials" in str(caught.value.fix)
        assert "wrong" not in str(caught.value)


def test_no_bucket_is_a_configuration_error(moto_port: int) -> None:
    with pytest.raises(MismatchError, match="bucket"):
        DumpWriter.open("s3://no-such-bucket/a", some_provenance(), options=options(moto_port))


def test_a_store_that_is_away_is_temporary(impatient: None) -> None:
    given = options(1)
    start = time.monotonic()
    for call in (
        lambda: Dump.open(URL, options=given),
        lambda: DumpWriter.open(URL, some_provenance(), options=given),
        lambda: Store(URL, options=given).put_new("x", b"1"),
        lambda: Store(URL, options=given).list("x"),
    ):
        with pytest.raises(TemporaryError, match="does not answer") as caught:
            call()
        assert caught.value.exit_code == Exit.TEMPORARY == 75
    assert time.monotonic() - start < 30


def test_the_real_limits_are_bounded() -> None:
    assert timedelta(minutes=2) <= remote.PATIENCE <= timedelta(minutes=3)
    assert {"connect_timeout", "read_timeout", "timeout"} == set(remote.READING)
    assert int(remote.READING["read_timeout"].removesuffix("s")) < 60


def test_the_probe_refuses_a_store_that_ignores_the_condition() -> None:
    server = TinyS3(conditional=False)
    try:
        with pytest.raises(MismatchError, match="If-None-Match") as caught:
            DumpWriter.open(URL, some_provenance(), options=options(server.port))
        assert "SeaweedFS" in str(caught.value.fix)
        assert not [key for key in server.objects if "run.json" in key]
    finally:
        server.close()


@pytest.mark.parametrize("fault", ["after", "lost", "before"])
def test_a_put_whose_answer_was_lost_counts_as_won(fault: str, tiny: TinyS3, impatient: None) -> None:
    """The client's retry meets its own first try: 412, and yet this writer has won."""
    tiny.fault = lambda method, key, n: fault if method == "PUT" and n == 1 else None
    files = Store(URL, options=options(tiny.port))
    assert files.put_new("commits/unit-00000000.json", b"mine")
    assert not files.put_new("commits/unit-00000000.json", b"other")
    assert tiny.objects[f"{BUCKET}/dumps/a/commits/unit-00000000.json"] == b"mine"


def test_a_put_of_which_every_answer_is_lost_is_read_back(tiny: TinyS3, impatient: None) -> None:
    tiny.fault = lambda method, key, n: "lost" if method == "PUT" else None
    files = Store(URL, options=options(tiny.port))
    assert files.put_new("commits/unit-00000000.json", b"mine")
    assert not files.put_new("commits/unit-00000000.json", b"other")


@pytest.mark.parametrize("fault", ["before", "after", "lost"])
@pytest.mark.parametrize("verb", ["PUT", "GET"])
def test_every_request_may_fail_once(verb: str, fault: str, tiny: TinyS3, impatient: None) -> None:
    tiny.fault = lambda method, key, n: fault if method == verb and n == 1 else None
    make_dump(URL, options=options(tiny.port))
    assert verify(URL, options=options(tiny.port)).ok
    assert len([key for key in tiny.objects if "/data/" in key]) == 3


def test_a_store_that_goes_away_in_the_middle(tiny: TinyS3, impatient: None) -> None:
    provenance = some_provenance()
    writer = DumpWriter.open(URL, provenance, options=options(tiny.port))
    writer.commit_unit(0, unit_rows(provenance, 0))
    tiny.fault = lambda method, key, n: "before" if "unit-00000001" in key else None
    with pytest.raises(TemporaryError, match="does not answer"):
        writer.commit_unit(1, unit_rows(provenance, 1))
    tiny.fault = lambda method, key, n: None
    assert make_again(provenance, tiny)


def make_again(provenance: object, tiny: TinyS3) -> bool:
    writer = DumpWriter.open(URL, some_provenance(), options=options(tiny.port))
    writer.put_tokenizer(TOKENIZER)
    for unit in sorted({0, 1, 2} - writer.committed()):
        assert writer.commit_unit(unit, unit_rows(some_provenance(), unit)) is not None
    return writer.seal() and verify(URL, options=options(tiny.port)).ok


def test_a_worker_sees_what_is_new_by_one_or_two_requests(seaweed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,250 units, among which a dead worker has left gaps: a page of the listing, and the unit under way."""
    monkeypatch.setattr(others, "LOOK_SECONDS", -1.0)
    url, provenance = f"s3://{BUCKET}/many", some_provenance(samples=5000)
    assert provenance.units == 1250

    def commit(units: Iterable[int]) -> None:
        files = Store(url, options=options(seaweed_port))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda unit: files.put_new(record_key(unit), b"{}"), units))

    commit(unit for unit in range(1100) if unit % 16)
    (port,) = free_ports(1)
    proxy = Proxy(port=port, store_port=seaweed_port)
    try:
        seen = others.Others(DumpWriter(Store(url, options=options(port)), provenance))
        assert (len(proxy.seen), len(seen.committed)) == (2, 1031)
        commit([0, 16, 800, 1150, 1248])
        # A page ends before unit 1,100: the second look begins behind it, the third at the first gap again.
        for under_way, requests, more in ((1248, 2, 4), (1200, 1, 5), (48, 1, 5)):
            before = len(proxy.seen)
            seen.look(under_way)
            while seen._answer is not None:
                time.sleep(0.01)
                seen.look(under_way)
            assert (len(proxy.seen) - before, len(seen.committed) - 1031) == (requests, more)
    finally:
        proxy.close()


# The cache of a node


def fetches(tiny: TinyS3) -> int:
    return len([key for method, key in tiny.requests if method == "GET" and "/data/unit" in key])


def test_a_shard_is_fetched_once_per_node(tiny: TinyS3, tmp_path: Path) -> None:
    make_dump(URL, options=options(tiny.port))
    before = fetches(tiny)
    for url in (URL, URL, URL.replace("s3:", "s3a:")):
        dump = Dump.open(url, options=options(tiny.port), cache_dir=tmp_path / "cache")
        for unit in range(3):
            dump.read_unit(unit)
    assert fetches(tiny) - before == 3


def read_unit(given: dict[str, str], cache: Path, barrier: object) -> None:
    dump = Dump.open(URL, options=given, cache_dir=cache)
    barrier.wait()  # type: ignore[attr-defined]
    dump.read_unit(0)


def test_processes_of_a_node_share_one_fetch(tiny: TinyS3, tmp_path: Path) -> None:
    make_dump(URL, options=options(tiny.port))
    before = fetches(tiny)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=read_unit, args=(options(tiny.port), tmp_path, barrier)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert fetches(tiny) - before == 1


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_corrupt_cached_copy_is_fetched_again(damage: bytes | None, tiny: TinyS3, tmp_path: Path) -> None:
    make_dump(URL, options=options(tiny.port))
    dump = Dump.open(URL, options=options(tiny.port), cache_dir=tmp_path)
    dump.read_unit(0)
    (cached,) = tmp_path.glob("*.parquet")
    original = cached.read_bytes()
    cached.write_bytes(original[:-1] + bytes([original[-1] ^ 1]) if damage is None else damage)
    before = fetches(tiny)
    assert len(dump.read_unit(0)) == 4
    assert fetches(tiny) - before == 1
    assert cached.read_bytes() == original


def test_a_download_that_was_damaged_is_repeated_once(tiny: TinyS3, tmp_path: Path) -> None:
    make_dump(URL, options=options(tiny.port))
    dump = Dump.open(URL, options=options(tiny.port), cache_dir=tmp_path)
    first = fetches(tiny)
    tiny.fault = lambda method, key, n: "damaged" if "/data/unit" in key and fetches(tiny) == first + 1 else None
    assert len(dump.read_unit(0)) == 4
    tiny.fault = lambda method, key, n: "damaged" if "/data/unit" in key else None
    with pytest.raises(DataError, match="not the file that was written"):
        dump.read_unit(1)
    assert len(list(tmp_path.glob("*.parquet"))) == 1, "what is not proven never gets into the cache"


def test_a_cache_that_cannot_be_used_says_so(tiny: TinyS3, tmp_path: Path) -> None:
    make_dump(URL, options=options(tiny.port))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MismatchError, match=r"cache(.|\n)*train.cache_dir"):
        Dump.open(URL, options=options(tiny.port), cache_dir=tmp_path / "file").read_unit(0)


DOWNLOADS = [
    "run.json",
    "SEALED.json",
    "manifest",
    "tokenizer/tokenizer.json",
    "TOKENIZER.json",
    "commits/unit-00000001",
]


@pytest.mark.parametrize("file", DOWNLOADS)
def test_every_file_that_was_damaged_on_its_way_is_fetched_once_more(file: str, tiny: TinyS3) -> None:
    provenance = make_dump(
        URL, options=options(tiny.port), seal=file not in ("TOKENIZER.json", "commits/unit-00000001")
    )
    tiny.requests.clear()
    tiny.fault = lambda method, key, n: "damaged" if method == "GET" and f"/{file}" in key and n == 1 else None
    dump = Dump.open(URL, options=options(tiny.port))
    assert len(dump.read_records()) == provenance.units
    assert dump.read_tokenizer() == TOKENIZER
    fetched = [key for method, key in tiny.requests if f"/{file}" in key]
    assert len(fetched) >= 2
    tiny.fault = lambda method, key, n: "damaged" if method == "GET" and f"/{file}" in key else None
    with pytest.raises(DataError):
        read_all(tiny)


@pytest.mark.parametrize("name", ["../../secret", "/secret", "%2e%2e/%2e%2e/secret", "s3://elsewhere/secret"])
def test_names_in_records_never_leave_the_prefix(name: str, tiny: TinyS3) -> None:
    """Of a dump that a stranger has made: what else its reader may read is not asked for."""
    provenance = make_dump(URL, options=options(tiny.port), seal=False)
    sha256 = hashlib.sha256(b"1").hexdigest()
    tiny.objects |= {f"{BUCKET}/secret": b"1", f"{BUCKET}/dumps/secret": b"1"}
    for record in (
        TokenizerRecord(fingerprint=provenance.fingerprint, files={name: sha256}),
        TokenizerRecord(fingerprint=provenance.fingerprint, files={f"../{name}": sha256}),
    ):
        tiny.objects[f"{BUCKET}/dumps/a/TOKENIZER.json"] = record.to_json()
        tiny.requests.clear()
        with pytest.raises(DataError, match="plain relative path"):
            Dump.open(URL, options=options(tiny.port)).read_tokenizer()
        assert {key for _, key in tiny.requests if not key.startswith(f"{BUCKET}/dumps/a/")} == set()


def read_all(tiny: TinyS3) -> None:
    dump = Dump.open(URL, options=options(tiny.port))
    dump.read_records()
    dump.read_tokenizer()


def test_a_follower_asks_once_per_record(tiny: TinyS3) -> None:
    make_dump(URL, options=options(tiny.port), seal=False)
    dump = Dump.open(URL, options=options(tiny.port))
    before = len(tiny.requests)
    assert dump.read_record(0) is not None
    assert dump.read_record(0) is not None
    assert dump.read_record(7) is None
    assert len(tiny.requests) - before == 2


# What never mends, and what does


def answer(status: int, code: str, message: str = "said") -> tuple[int, bytes]:
    body = f'<?xml version="1.0"?>\n<Error>\n<Code>{code}</Code><Message>{message}</Message></Error>'
    return status, body.encode()


NEVER = {
    "expired token": (answer(400, "ExpiredToken"), "expired"),
    "invalid token": (answer(400, "InvalidToken"), "expired"),
    "expired and forbidden": (answer(403, "ExpiredToken"), "expired"),
    "another time": (
        answer(403, "RequestTimeTooSkewed", "said: the server&#39;s time"),
        "the clock of this machine is not that of (.|\\n)* said: the server's time",
    ),
    "another region": (answer(301, "PermanentRedirect"), "another region"),
    "region of the signature": (answer(400, "AuthorizationHeaderMalformed", "expecting eu-west-1"), "another region"),
    "no bucket": (answer(404, "NoSuchBucket"), "bucket of .* does not exist"),
    "forbidden": (answer(403, "AccessDenied"), "no access"),
    "not implemented": (answer(501, "NotImplemented"), "refuses"),
    "bad request": (answer(400, "InvalidArgument"), "refuses"),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_never_mends_ends_at_once(case: str, tiny: TinyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    given, says = NEVER[case]
    monkeypatch.setitem(remote.RETRY, "backoff", {"init_backoff": timedelta(milliseconds=1), "base": 2})
    tiny.fault = lambda method, key, n: given
    files = Store(URL, options=options(tiny.port))
    for call in (lambda: files.get("x"), lambda: files.put_new("x", b"1"), lambda: files.list("x")):
        with pytest.raises(MismatchError, match=says) as caught:
            call()
        assert caught.value.exit_code == 78
        assert case == "another region" or "said" in str(caught.value) or "expecting" in str(caught.value)
    assert len(tiny.requests) <= 12


def test_an_error_body_that_repeats_the_request_is_masked(tiny: TinyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-session-token")
    tiny.fault = lambda method, key, n: answer(
        403, "SignatureDoesNotMatch", "token canary-session-token, key testsecret"
    )
    with pytest.raises(MismatchError, match="SignatureDoesNotMatch: token") as caught:
        Store(URL, options=options(tiny.port)).get("x")
    assert "canary" not in str(caught.value)
    assert "testsecret" not in str(caught.value)


def test_an_unknown_host_or_authority_is_a_configuration_error(impatient: None, tmp_path: Path) -> None:
    unknown = options(1) | {"endpoint": "http://no-such-host.invalid"}
    with pytest.raises(MismatchError, match=r"host of (.|\n)*(not known|No address)") as caught:
        Store(URL, options=unknown).get("x")
    with pytest.raises(TemporaryError):
        remote.persistently(lambda: raised(caught.value.__cause__), URL, answered=True)
    with tls(tmp_path) as port, pytest.raises(MismatchError, match=r"no trusted connection(.|\n)*UnknownIssuer"):
        Store(URL, options=options(1) | {"endpoint": f"https://localhost:{port}"}).get("x")


def raised(error: BaseException | None) -> None:
    assert error is not None
    raise error


@pytest.mark.parametrize("fault", ["stall", "reset", "before", "lost"])
def test_a_body_that_stalls_or_breaks_off_is_asked_for_again(fault: str, tiny: TinyS3, impatient: None) -> None:
    tiny.objects[f"{BUCKET}/dumps/a/x"] = bytes(range(256)) * 4000
    tiny.fault = lambda method, key, n: fault if n <= 3 else None
    start = time.monotonic()
    assert Store(URL, options=options(tiny.port)).get("x") == bytes(range(256)) * 4000
    assert time.monotonic() - start < 3
    tiny.fault = lambda method, key, n: fault
    with pytest.raises(TemporaryError):
        Store(URL, options=options(tiny.port)).get("x")


def test_a_store_is_asked_for_as_long_as_promised(tiny: TinyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled down: a burst of 503 that ends just before the patience does is survived, whatever the number of tries."""
    be_impatient(monkeypatch)
    monkeypatch.setattr(remote, "PATIENCE", timedelta(seconds=2))
    tiny.objects[f"{BUCKET}/dumps/a/x"] = b"1"
    for away in (1.6, 60):
        start = time.monotonic()
        tiny.fault = lambda method, key, n, end=start + away: (  # type: ignore[misc]
            answer(503, "SlowDown") if time.monotonic() < end else None
        )
        if away < 2:
            assert Store(URL, options=options(tiny.port)).get("x") == b"1"
        else:
            with pytest.raises(TemporaryError, match="SlowDown"):
                Store(URL, options=options(tiny.port)).get("x")
        assert away < 2 or 1.5 < time.monotonic() - start < 4


def test_a_listing_that_breaks_off_is_made_again(tiny: TinyS3, impatient: None) -> None:
    tiny.objects |= {f"{BUCKET}/dumps/a/data/{i}": b"1" for i in range(50)}
    tiny.fault = lambda method, key, n: "reset" if n <= 2 else None
    assert len(Store(URL, options=options(tiny.port)).list("data")) == 50
