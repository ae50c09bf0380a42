"""Secrets belong into the environment: where a configuration or a command line holds one, it is refused unprinted.

What a run is configured with is copied to its directory, its report and its processes' command lines.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from storage_schemas.common.secrets import IN_QUERY, has_token, is_secret

VARIABLES = {
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "session_token": "AWS_SESSION_TOKEN",
    "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "access_key": "AZURE_STORAGE_ACCOUNT_KEY",
    "sas": "AZURE_STORAGE_SAS_TOKEN",
    "client_secret": "AZURE_STORAGE_CLIENT_SECRET",
    "service_account_key": "GOOGLE_SERVICE_ACCOUNT_KEY",
    "hf_token": "HF_TOKEN",
    "wandb": "WANDB_API_KEY",
}
"""Part of a setting's name -> environment variable."""
_SURELY = re.compile(
    r"secret|passw|credential|(session|access|auth|bearer|sas|hf|hub|api|security).?token|"
    r"(access|account|api|private|shared|storage|wandb|customer).?key|_sas$|^token$|^use_auth_token$",
    re.I,
)
"""Outside of storage options, where `max_num_batched_tokens` and the like are no secrets."""
_USERINFO = re.compile(r"\w://[^\s/]*@|\w://[^\s/:]+:[^\s]*@")
_HARMLESS = re.compile(r"skip_signature$|_(id|file|path|uri|url|endpoint|dir)$", re.I)


def is_secret_option(name: str) -> bool:
    """Whether an object store's option of this name holds a secret."""
    return is_secret(name) and not name.lower().endswith("skip_signature")


def has_secret(value: str) -> bool:
    """Whether a value carries credentials whatever it is called: a URL with a user in it, a signed one, or a token."""
    start = value[:8192]
    return has_token(start) or ("://" in start and bool(_USERINFO.search(start) or IN_QUERY.search(start)))


def instead(name: str) -> str:
    """Where a secret of this name belongs."""
    found = next((variable for part, variable in VARIABLES.items() if part in name.lower()), None)
    return f"set the environment variable {found}" if found else "put it into the environment"


def secrets_in(
    data: Any, known: Collection[str], path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[str, str]]:
    """(dotted path, remedy) of every secret, by the name of a setting or the look of a value.

    Args:
        data: of a configuration, before it is validated, so secrets may be anywhere and of any type.
        known: names of settings that are no secrets.
        seen: what was looked at before; an alias is looked at once.
    """
    seen = set() if seen is None else seen
    if isinstance(data, dict | list) or (isinstance(data, str) and len(data) > 1000):
        if id(data) in seen:
            return
        seen.add(id(data))
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            name, place = str(key), (*path, str(key))
            options = "storage_options" in path
            named = isinstance(key, str) and name not in known and value is not None and value != ""
            if named and (is_secret_option(name) if options else _SURELY.search(name) and not _HARMLESS.search(name)):
                yield ".".join(place), instead(name)
            else:
                yield from secrets_in(value, known, place, seen)
    elif isinstance(data, str) and (has_secret(data) or _names_one(data, path)):
        yield ".".join(path), "give credentials in the environment"


def _names_one(text: str, path: tuple[str, ...]) -> bool:
    """Whether text in place of a mapping of storage options has options in it."""
    key = re.match(r"\s*\{?\s*[\"']?(\w+)[\"']?\s*[:=]", text[:200])
    return path[-1:] == ("storage_options",) or bool(key and "storage_options" in path and is_secret_option(key[1]))
