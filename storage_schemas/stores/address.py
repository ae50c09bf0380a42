"""What a user may write where a place is asked for: a path, or the URL of an object store."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

from storage_schemas.stores.hub import READ_ONLY, hub_place

STORES = ("s3", "gs", "az")
"""Schemes of object stores."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)")
_VARIABLE = re.compile(r"\$(\{|[A-Za-z_])")
_SPELLINGS = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
"""Other names of the same stores: a place has one spelling, so that identities, caches and comparisons see one."""
_HTTP = "write s3://bucket/prefix; the server's address is the storage option `endpoint`"
_INSTEAD = {"http": _HTTP, "https": _HTTP, "hf": "write hf://datasets/USER/NAME"}
_ENDPOINTS = ("endpoint", "endpoint_url", "aws_endpoint", "aws_endpoint_url", "aws_endpoint_url_s3")
_ENVIRONMENT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def located(text: str) -> str:
    """`text` with `~` replaced by the home directory, and with the usual name of its object store.

    Raises:
        ValueError: taken literally it would name something that nobody means: it is empty, has a variable or an
            invisible character in it, or a scheme with one slash.
    """
    if not text.strip():
        raise ValueError("is empty; give a path or a URL")
    if text != text.strip() or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("holds a line break, NUL or blank at an end; remove it")
    if _VARIABLE.search(text):
        raise ValueError("environment variables are not expanded in YAML; write the value, or --set KEY=... in a shell")
    scheme = _SCHEME.match(text)
    if scheme and (len(scheme[2]) == 1 or (not scheme[2] and scheme[1] in (*STORES, *_SPELLINGS, *_INSTEAD, "file"))):
        raise ValueError(f"has too few slashes; write {scheme[1]}://, or ./{scheme[1]}: for a folder")
    if scheme and scheme[1] in _SPELLINGS and scheme[2]:
        text = _SPELLINGS[scheme[1]] + text[scheme.end(1) :]
    if text.startswith("~"):
        text = os.path.expanduser(text)
        if text.startswith("~"):
            raise ValueError("has an unknown user after ~; write the home directory, or ./~ for a folder of this name")
    return text


def dump_url(text: str) -> str:
    """Where a dump may lie: `located`, and a local path, file://, the URL of an object store, or of the hub, to read.

    Raises:
        ValueError: it is something else, or carries credentials.
    """
    text = located(text)
    scheme, there, rest = text.partition("://")
    if not there:
        return text
    if scheme == "hf":
        if hub_place(text).kind != "dataset":
            raise ValueError("names a model's repository; a dump lies in hf://datasets/USER/NAME")
        return text
    if scheme not in (*STORES, "file"):
        fix = _INSTEAD.get(scheme.lower(), "write a local path, file://, s3://, gs:// or az://")
        raise ValueError(f"has the scheme {scheme[:20]}://, which holds no dumps; {fix}")
    bucket = rest.split("/")[0]
    if scheme in STORES and ("@" in bucket or ":" in bucket):  # A password may hold a slash; a bucket has no colon.
        raise ValueError(
            "must not carry credentials; write scheme://bucket/prefix and give credentials in the environment "
            "(for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    if scheme in STORES and not bucket:
        raise ValueError(f"names no bucket; write {scheme}://bucket/prefix")
    if scheme == "file" and not rest.startswith("/"):
        raise ValueError("names another host; write file:///path")
    return text


def store_url(text: str) -> str:
    """Where something may be written by many: as `dump_url`, but not the hub."""
    if text.startswith("hf://"):
        raise ValueError(f"lies on the hub, which has no put-if-absent; {READ_ONLY}")
    return dump_url(text)


def local_folder(given: Any) -> Any:
    """A directory on this machine: `located`, and no URL.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(given, str | Path):
        return given
    # A path has lost the second slash of a URL.
    text = located(str(given))
    if "://" in text:
        raise ValueError("is a URL; give a directory on this machine")
    return text


DumpUrl = Annotated[str, AfterValidator(dump_url)]
"""Field of a dump's URL."""
StoreUrl = Annotated[str, AfterValidator(store_url)]
"""Field of the URL of what is written."""
Located = Annotated[str, AfterValidator(located)]
"""Field of a path, URL or id."""
LocalFolder = Annotated[Path, BeforeValidator(local_folder)]
"""Field of a directory on this machine."""


def local_path(url: str) -> Path | None:
    """The directory that `url` names on this machine, or None for an object store."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url else Path(os.path.expanduser(url))


def endpoint(options: Mapping[str, str]) -> str:
    """The configured address of the object store, or nothing.

    Raises:
        ValueError: it is no address, or carries credentials.
    """
    given = {f"the storage option `{key}`": value for key, value in options.items() if key.lower() in _ENDPOINTS}
    addresses = given | {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)}
    for name, address in addresses.items():
        if "@" in address:
            raise ValueError(f"{name} must not carry credentials; give them in the environment")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", address):
            raise ValueError(f"{name} is no address; write http://host:port or https://host")
        if parts.port == 0:
            raise ValueError(f"{name} has no port")
    return next(iter(addresses.values()), "")
