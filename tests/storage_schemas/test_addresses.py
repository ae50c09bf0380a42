"""What is refused where a place is asked for, before anything is contacted or written; and no secret is printed."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from storage_schemas.common.errors import MismatchError
from storage_schemas.common.secrets import is_secret, masked, remember_secrets
from storage_schemas.stores.address import DumpUrl, LocalFolder, Located, dump_url, endpoint
from storage_schemas.stores.store import Store

REFUSED = {
    "": "empty", " ": "empty", " /data/x": "blank", "/data/x\n": "line break", "/data/\0x": "NUL",
    "s3://b/x\ny": "line break", "s3:/bucket/x": "slashes", "s3:bucket/x": "slashes", "gs:/x": "slashes",
    "file:/x": "slashes", "weird:/x": "slashes", "${SCRATCH}/x": "not expanded", "$HOME/x": "not expanded",
    "s3://$BUCKET/x": "not expanded", "~nobody-of-this-name/x": "unknown user", "https://host/x": "endpoint",
    "http://host/x": "endpoint", "hf://datasets/x": "no repository", "hf://u/m": "a model's", "gcs:/x": "slashes",
    "s3a:x": "slashes",
    "gcs:///x": "no bucket",
    "weird://b/x": "holds no dumps", "S3://b/x": "holds no dumps", "s3:///x": "no bucket",
    "file://host/x": "another host",
    "s3://key:canary-secret@bucket/x": "credentials", "s3://key:canary/secret@bucket/x": "credentials",
    "s3://canary-secret@bucket": "credentials",
}  # fmt: skip


class Settings(BaseModel):
    url: DumpUrl = "x"
    folder: LocalFolder = Path("x")
    source: Located = "x"


@pytest.mark.parametrize("url", REFUSED)
def test_what_nobody_means_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MismatchError, match=REFUSED[url]) as caught:
        Store(url)
    assert "canary" not in str(caught.value)
    with pytest.raises(ValidationError, match=REFUSED[url]):
        Settings(url=url)
    assert not list(tmp_path.iterdir())


def test_home_is_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.model_validate({"url": "~/dump", "folder": "~"}) == Settings(
        url=f"{tmp_path}/dump", folder=tmp_path
    )
    Store("~/dump").put_new("x", b"1")
    assert (tmp_path / "dump" / "x").is_file()
    for url in (
        "s3://bucket/us$1",
        "dump",
        "./s3:/x",
        "/data/a:b",
        "file:///data",
        "az://container/x@y",
        "hf://datasets/u/n@v1/a",
    ):
        assert dump_url(url) == url


@pytest.mark.parametrize("url", ["gs://b/x", "gcs://b/x", "s3://b/x", "s3a://b/x", "s3n://b/x"])
def test_a_place_has_one_spelling(url: str) -> None:
    usual = "gs://b/x" if url.startswith("g") else "s3://b/x"
    assert Settings(url=url, source=url) == Settings(url=usual, source=usual)
    assert Store(url).url == Settings(source=url).source == usual


@pytest.mark.parametrize("folder", ["", "s3://bucket/out", "s3:/bucket/out", "$HOME/out", "out\n", "file:///out"])
def test_an_output_is_a_directory_here(folder: str) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"folder": folder})


BAD_OPTIONS = [
    {"nonsense": "1"}, {"region": "us\neast"}, {"endpoint": "not a url"}, {"endpoint": "http://u:canary@host"},
    {"endpoint": "http://u:canary/x@host"}, {"endpoint": "ftp://host"}, {"virtual_hosted_style_request": "maybe"},
]  # fmt: skip


@pytest.mark.parametrize("given", BAD_OPTIONS, ids=str)
def test_options_that_no_store_takes(given: dict[str, str]) -> None:
    with pytest.raises(MismatchError, match="cannot be opened") as caught:
        Store("s3://bucket/x", options=given)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_endpoints_of_the_environment_carry_no_credentials(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://user:canary-secret@127.0.0.1:1")
    with pytest.raises(MismatchError, match="credentials") as caught:
        Store("s3://bucket/x")
    assert "canary" not in str(caught.value)
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert endpoint({}) == "http://127.0.0.1:1"
    assert endpoint({"endpoint": "https://other"}) == "https://other"


def test_secrets_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary+token/1==")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-environment")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    remember_secrets({"secret_access_key": "canary-option", "sas_token": "canary-sas", "region": "us-east-1"})
    text = (
        "GET s3://me:canary/pass@bucket/x?X-Amz-Signature=canary1&X-Amz-Security-Token=canary%2Btoken%2F1%3D%3D&y=1 "
        "canary-option canary-sas canary+token/1== <AWSAccessKeyId>canary2</AWSAccessKeyId><Token-0>canary3</Token-0>"
        "<StringToSign>canary4\n5</StringToSign><Code>InvalidToken</Code> canary-environment us-east-1 eu-west-1\n"
        "Authorization: AWS4-HMAC-SHA256 Credential=canary6, Signature=canary7\nthe end"
    )
    told = masked(text)
    assert "canary" not in told
    for kept in ("us-east-1", "eu-west-1", "<Code>InvalidToken</Code>", "@bucket/x", "the end", "&y=1"):
        assert kept in told
    assert masked("nothing of the kind: s3://bucket/a b@c") == "nothing of the kind: s3://bucket/a b@c"
    assert not is_secret("TOKENIZERS_PARALLELISM")
    assert not is_secret("AWS_WEB_IDENTITY_TOKEN_FILE")
    assert is_secret("azure_storage_account_key")
    assert is_secret("WANDB_API_KEY")
