"""Object stores: opened, asked with patience, and what they say told to the user.

What can mend is asked again for `PATIENCE`; what cannot ends at once as a configuration error.
"""

import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from html import unescape
from typing import Any, TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from storage_schemas.common.errors import MismatchError, NeoError, TemporaryError
from storage_schemas.common.interrupt import interruptible
from storage_schemas.common.secrets import masked, remember_secrets
from storage_schemas.stores.address import dump_url, endpoint

T = TypeVar("T")
PATIENCE = timedelta(minutes=2)
"""How long a request is repeated before the store counts as away."""
RETRY: dict[str, Any] = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2},
    "retry_timeout": timedelta(seconds=30),
}
"""What the client repeats by itself, a page of a listing or the rest of a body among it; the patience is ours."""
READING: dict[str, Any] = {"connect_timeout": "10s", "read_timeout": "45s", "timeout": "10m"}
"""Time limits of a request that reads: a body that stalls is noticed, one that is long and flows is not cut off."""
WRITING: dict[str, Any] = {"connect_timeout": "10s", "timeout": "3m"}
"""Of one that writes. An answer comes only after the whole shard, so there is no limit for a single read."""
_LONGEST_WAIT = 10.0
SETTING = "dump.url or dump.storage_options"

_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.]+)</Code>|\"code\"\s*:\s*\"?([\w.]+)")
_SAID = re.compile(r"<Message>([^<]*)</Message>|\"message\"\s*:\s*\"([^\"]*)\"")
_RETRIES = re.compile(r" in [\d.]+\S?s(, after \d+ retries, max_retries: \d+, retry_timeout: \S+)?")
_MENDS = {"RequestTimeout", "BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
"""Codes of 400 that tell of one request, not of all."""
_MENDING_STATUS = {408, 409, 425, 429}
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired", "token has expired")
_CLOCK = ("RequestTimeTooSkewed", "RequestTimeSkewed")
_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "incorrectly configured region", "IllegalLocation")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")
_TLS = ("InvalidCertificate", "InvalidMessage(", "HandshakeFailure", "UnknownIssuer")


def object_store(
    url: str, options: Mapping[str, str], *, setting: str = SETTING, client: Mapping[str, Any] | None = None
) -> Any:
    """obstore's view of an object store; nothing is contacted.

    Args:
        url: `s3://bucket/prefix`, `gs://` or `az://`.
        options: such as `endpoint`; credentials come from the environment.
        client: time limits, `READING` if not given.

    Raises:
        MismatchError: the URL or an option is not understood, or carries credentials.
    """
    remember_secrets(options)
    try:
        url = dump_url(url)
        http = {"allow_http": True} if endpoint(options).startswith("http://") else {}
        if bad := [key for key, value in options.items() if not value.isprintable()]:
            raise ValueError(f"the option {bad[0]} holds a line break or another control character")
        config: Any = dict(options) or None
        limits = dict(READING if client is None else client) | http
        return from_url(url, config=config, client_options=limits, retry_config=RETRY)  # type: ignore[call-overload]
    except BaseException as error:
        if not (isinstance(error, (BaseError, ValueError, TypeError)) or _is_panic(error)):
            raise
        raise MismatchError(
            f"the URL {masked(url)} cannot be opened",
            got=_in_short(error),
            expected="a local path, file://, s3://, gs:// or az://, and options of that store",
            fix=f"correct {setting}",
        ) from error


def persistently(call: Callable[[], T], url: str, *, setting: str = SETTING, answered: bool = False) -> T:
    """The result of `call`, a whole request to an object store, repeated while its error is one that can mend.

    Args:
        call: may be made again from its start.
        url: of what is asked, for the messages.
        setting: where the user wrote it.
        answered: the store has answered before, so its name is right.

    Raises:
        FileNotFoundError: there is no such key.
        MismatchError: no repetition can help.
        TemporaryError: the store was away for `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE.total_seconds()
    wait = RETRY["backoff"]["init_backoff"].total_seconds()
    while True:
        try:
            return interruptible(call)
        except BaseException as error:
            if not (isinstance(error, (BaseError, FileNotFoundError, PermissionError)) or _is_panic(error)):
                raise
            if isinstance(error, FileNotFoundError) and not _names(error, _NO_BUCKET):
                raise
            told = failure(error, url, setting=setting, answered=answered)
            left = deadline - time.monotonic()
            if isinstance(told, MismatchError) or left <= 0:
                raise told from error
        time.sleep(min(wait * random.uniform(0.5, 1.0), left))
        wait = min(2 * wait, _LONGEST_WAIT)


def failure(error: BaseException, url: str, *, setting: str = SETTING, answered: bool = False) -> NeoError:
    """What the user is told: MismatchError if no repetition can help, else TemporaryError."""
    match = _STATUS.search(str(error))
    status = int(match[1]) if match else None
    unknown_host = _names(error, ("dns error",)) and not _names(error, ("Temporary failure",))
    if _names(error, _EXPIRED):
        what, expected, fix = "the credentials for {} have expired", "valid ones", "renew the credentials"
    elif _names(error, _CLOCK):
        what, expected, fix = (
            "the clock of this machine is not that of {}",
            "less than 15 minutes",
            "set the clock (NTP)",
        )
    elif _names(error, _REGION):
        what, expected = "{} lies in another region", "the region of the bucket"
        fix = f"set `region` in {setting}, or AWS_REGION"
    elif is_refusal(error):
        what, expected = "no access to {}", "permission to get and list; to put as well in stage one"
        fix = "check the credentials in the environment and the permissions that go with them"
    elif _names(error, _NO_BUCKET) or status == 404:
        what, expected, fix = "the bucket of {} does not exist", "a bucket", f"create it, or correct {setting}"
    elif _names(error, _TLS):
        what, expected = "no trusted connection to {}", "HTTPS with a certificate of a known authority"
        fix = f"correct the endpoint in {setting}, or name the authority's certificate in SSL_CERT_FILE"
    elif unknown_host and not answered:
        what, expected = "the host of {} is not known", "a name that can be resolved"
        fix = f"correct {setting}, `--store endpoint=URL` of a command that has the URL, or AWS_ENDPOINT_URL"
    elif _is_panic(error) or _names(error, ("builder error",)):
        what, expected, fix = "the client cannot ask {}", "options of this store", f"correct {setting}"
    elif status == 501 or (status and 300 <= status < 500 and not _can_mend(status, error)):
        what, expected, fix = "{} refuses the request", "an answer", f"correct {setting}"
    else:
        fix = "run the same command again when it does"
        return TemporaryError(f"the store {masked(url)} does not answer", got=_in_short(error), fix=fix)
    return MismatchError(what.format(masked(url)), got=_in_short(error), expected=expected, fix=fix)


def is_refusal(error: BaseException) -> bool:
    """Whether access is denied, or there are no credentials (then the client asks a cloud machine's own address)."""
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
        return True
    # A refused LIST or DELETE has no class of its own.
    return _names(error, ("403 Forbidden", "401 Unauthorized", "(code: AccessDenied)", "169.254.169.254"))


def _in_short(error: BaseException | None) -> str:
    """What an error of an object store says: its first line, the store's own words, the deepest cause; no secrets."""
    text = str(error).strip() if error is not None else ""
    if not text:
        return type(error).__name__
    said, _, debug = text.partition("\n\nDebug source:")
    line = _RETRIES.sub("", said.splitlines()[0].split(": <")[0].strip())
    code, message = _first(_CODE, said), unescape(_first(_SAID, said) or "")
    if code or message:
        return masked(": ".join([line, *filter(None, (code, message))]))
    # The innermost of nested structures is the last line of their print-out that says something.
    inner = [part for part in (piece.strip(" ,(){}[]") for piece in debug.splitlines()) if part]
    cause = re.sub(r"^\w+: ", "", inner[-1]).strip('"') if inner else ""
    return masked(line if not cause or cause in line or _STATUS.search(line) else f"{line}: {cause}")


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return next(filter(None, match.groups()), None) if match else None


def _names(error: BaseException, signs: tuple[str, ...]) -> bool:
    return any(sign in str(error) for sign in signs)


def _can_mend(status: int, error: BaseException) -> bool:
    return status in _MENDING_STATUS or (status == 400 and _first(_CODE, str(error)) in _MENDS)


def _is_panic(error: BaseException) -> bool:
    """A panic of the native client is no Exception."""
    return type(error).__name__ == "PanicException"
