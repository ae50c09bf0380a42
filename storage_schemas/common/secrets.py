"""Secrets, kept out of whatever is printed, logged or written."""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote

_MASK = "***"
_SHORTEST = 6
"""Shorter values are no secrets, and masking them would garble the text."""
_SECRET = re.compile(
    r"secret|token|passw|credential|signature|(account|access|api|private|shared|sas|storage|customer).?key|_sas$", re.I
)
_PLACE = re.compile(r"(file|path|uri|url|endpoint|dir|application_credentials|parallelism)$", re.I)
"""Names that say where a secret lies, or what it is called in a setting that holds none."""
IN_QUERY = re.compile(
    r"([?&#](?:sig|key|x-(?:amz|goog)-[\w-]+|[\w-]*(?:token|secret|signature|credential|passw|(?:api|access).?key)[\w-]*)=)"
    r"[^\s&#<>\"']+",
    re.I,
)
"""A parameter of a URL that signs it or lets its owner in: name and value."""
_PATTERNS = (
    # Userinfo of a URL; a password may hold a slash. In hf://USER/NAME@REVISION it is none.
    (re.compile(r"(\w://)(?<!\bhf://)[^\s\"'<>]*@"), rf"\1{_MASK}@"),
    (re.compile(r"(\bhf://)[^\s\"'<>@]*:[^\s\"'<>]*@"), rf"\1{_MASK}@"),
    # Query parameters and headers of a signed request.
    (re.compile(r"(authorization[\"']?\s*[:=]\s*)[^\n<]+", re.I), rf"\1{_MASK}"),
    (IN_QUERY, rf"\1{_MASK}"),
    (re.compile(r"\b((?:x-amz-)?(?:security-token|signature|credential)|sig|access_token)=[^\s&,;<>\"']+", re.I),
     rf"\1={_MASK}"),
    # What an error body repeats of the request.
    (re.compile(r"<([\w-]*(?:token-?\d*|secret\w*|signature\w*|accesskeyid|stringtosign\w*|canonicalrequest\w*))>[^<]*",
                re.I), rf"<\1>{_MASK}"),
    (re.compile(r"(x-amz-security-token[\"']?\s*:\s*)[^\s<]+", re.I), rf"\1{_MASK}"),
)  # fmt: skip
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b|\bA[KS]IA[A-Z0-9]{16}\b")
"""What can be nothing but a token of the Hugging Face hub or an access key of AWS."""
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a setting or an environment variable of this name holds a secret."""
    return bool(_SECRET.search(name)) and not _PLACE.search(name)


def has_token(text: str) -> bool:
    """Whether there is a token in it that is known by its look."""
    return bool(_TOKEN.search(text))


def remember_secrets(settings: Mapping[str, str]) -> None:
    """From now on `masked` knows the values of the settings whose names say that they are secret."""
    _known.update(_secrets_of(settings))


def masked(text: str) -> str:
    """`text` without secrets.

    What goes: values of secret settings (`remember_secrets`) and environment variables wherever they stand, userinfo in
    URLs, what signs a request (tokens, signatures, `Authorization`), and what looks like a token.
    """
    for value in sorted(_known | _secrets_of(os.environ), key=len, reverse=True):
        for form in {value, quote(value, safe="")}:
            text = text.replace(form, _MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _TOKEN.sub(_MASK, text)


def shown(text: str) -> str:
    """`masked`, and every control character escaped but line ends: files of strangers must not command a terminal."""
    return visible(masked(text))


def visible(text: str) -> str:
    """Text in which every character shows: control characters and their like are escaped, line ends are kept.

    A sample may hold anything, terminal commands and changes of the writing direction included.
    """
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def _secrets_of(settings: Mapping[str, str]) -> set[str]:
    return {value for name, value in settings.items() if is_secret(name) and len(value) >= _SHORTEST}
