"""run.json: what made a dump. Its canonical hash is the dump's fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from storage_schemas.common.errors import DataError, MismatchError
from storage_schemas.common.frozen import Section
from storage_schemas.config import Adaptive, Estimator, Sampled, Temperatures, TopK

FORMAT_VERSION = 1
M = TypeVar("M", bound=BaseModel)


class _Identity(Section):
    """A record whose absent fields are left out, not null: what the first writers had alone, and what they lacked."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return {name: value for name, value in content.items() if name in self.model_fields_set or value is not None}


class TeacherIdentity(_Identity):
    """The model behind the logits: what it is, wherever it lies."""

    config_sha256: str
    """Hash of what config.json says, see `teacher_dump/teachers/model_files.py`; the first writers hashed the file."""
    weights_sha256: dict[str, str]
    """Hash of each weight file, by file name."""
    dtype: str
    """Compute dtype of the forward pass."""
    lm_head_rows: int = Field(alias="head_size", ge=1, lt=2**31)
    """Rows of the LM head, `head_size` in run.json: every target id is below it."""
    model: str | None = None
    """Of the first writers alone; see `MadeBy.model`."""
    revision: str | None = None
    """Of the first writers alone; see `MadeBy.revision`."""


class TokenizerIdentity(Section):
    """The tokenizer that made the ids."""

    vocab_size: int = Field(ge=1, lt=2**31)
    """Number of ids that the tokenizer knows; the head may be padded beyond it."""
    vocab_sha256: str
    """Hash of the id -> token map, see `storage_schemas.tokenizer`."""
    chat_template_sha256: str | None
    """Hash of the chat template."""


class CorpusIdentity(Section):
    """The frozen corpus."""

    fingerprint: str
    """Hash over every sample's id, status, token ids and loss mask, in order."""
    samples: int = Field(ge=1, le=10**12)
    """Number of samples N; sample indices are 0 ... N - 1."""
    mask: str
    """Which tokens are supervised."""
    max_length: int = Field(lt=2**31)
    """Tokens per sample, at most."""
    too_long: str
    """What happened to longer samples."""


class EngineIdentity(_Identity):
    """The software that ran the teacher."""

    name: str
    """Backend."""
    arguments: dict[str, Any] | None = None
    """Settings of it that may change what it computes; absent for the first writers."""
    version: str | None = None
    """Of the first writers alone: version, and ` with ` arguments as JSON."""


class MadeBy(Section):
    """Where the teacher lay and what it ran with when the dump was begun: a note, which nothing is compared with."""

    model: str
    """Directory or hub id, as the first worker had it."""
    revision: str | None = None
    """Resolved commit on the hub; null for a directory."""
    config_file_sha256: str | None = None
    """Hash of the file config.json; dumps of the first writers know the config by it."""
    versions: dict[str, str] = {}
    """Of the engine and of libraries, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is kept of the logits of a supervised token."""

    estimator: Estimator
    """How targets are chosen."""
    temperatures: Sequence[float] = (1.0,)
    """Of the stored tail masses; the first is 1."""
    logsumexp: bool = False
    """Whether to keep the logsumexp of the raw logits."""
    masked_from: int | None = None
    """Ids from here on have no probability; None: all rows of the head have."""


class Provenance(_Identity):
    """Everything that determines the content of a dump, and a note on what made it."""

    format_version: int = FORMAT_VERSION
    """Version of the dump format, see docs/format.md."""
    teacher: TeacherIdentity
    """The model."""
    tokenizer: TokenizerIdentity
    """The tokenizer."""
    corpus: CorpusIdentity
    """The samples."""
    samples_per_unit: int = Field(ge=1, lt=2**31)
    """Unit u holds samples [u * samples_per_unit, (u + 1) * samples_per_unit)."""
    estimator: Estimator
    """How targets were chosen."""
    temperatures: Temperatures
    """Temperatures for which the tail mass is stored."""
    logsumexp: bool
    """Whether logsumexp is stored."""
    logprob_step: float
    """Coarsest rounding grid in nats that was allowed."""
    max_kl: float
    """Fidelity gate in nats."""
    engine: EngineIdentity
    """The software."""
    masked_from: int | None = Field(None, ge=1, lt=2**31)
    """Logits of ids from here on, rows of the head that the tokenizer lacks, were masked before anything was computed;
    absent: of none, because there are none or because the first writers did not."""
    made_by: MadeBy | None = None
    """No part of the identity, nor of the fingerprint; absent in dumps of the first writers, whose `teacher` and
    `engine` say it."""

    @model_validator(mode="after")
    def _origin_in_one_place(self) -> Self:
        places = (self.made_by is None, self.teacher.model is not None, self.engine.version is not None)
        if len(set(places)) > 1:
            raise ValueError("either made_by, or teacher.model and engine.version as the first writers had them")
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON without `made_by`."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude={"made_by"}))).hexdigest()

    @property
    def origin(self) -> MadeBy:
        """Where the teacher lay and what it ran with."""
        if self.made_by is not None:
            return self.made_by
        versions = {} if self.engine.version is None else {self.engine.name: self.engine.version}
        return MadeBy(model=str(self.teacher.model), revision=self.teacher.revision, versions=versions)

    @property
    def content(self) -> dict[str, Any]:
        """What must agree for targets to belong into one dump: the same form whoever wrote it."""
        found = self.model_dump(mode="json", exclude={"made_by": True, "teacher": {"model", "revision"}})
        if found["engine"].pop("version", None) is not None:
            _, _, arguments = str(self.engine.version).partition(" with ")
            try:
                found["engine"]["arguments"] = json.loads(arguments or "{}")
            except ValueError:
                found["engine"]["arguments"] = arguments
        return found

    @property
    def recipe(self) -> Recipe:
        """What is kept of the teacher's logits."""
        return Recipe(
            estimator=self.estimator,
            temperatures=self.temperatures,
            logsumexp=self.logsumexp,
            masked_from=self.masked_from,
        )

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.corpus.samples // self.samples_per_unit)

    @property
    def max_entries(self) -> int:
        """Entries per token, at most."""
        match self.estimator:
            case TopK(k=k) | Adaptive(k_max=k):
                return k + self.estimator.draws
            case Sampled(draws=draws):
                return draws

    def unit_range(self, unit: int) -> range:
        """Sample indices of `unit`."""
        start = unit * self.samples_per_unit
        return range(start, min(start + self.samples_per_unit, self.corpus.samples))

    def temperature_index(self, temperature: float) -> int:
        """Column of the stored tail masses that belongs to `temperature`.

        Raises:
            MismatchError: the dump was not made for this temperature; draws are only valid at 1.
        """
        if self.estimator.draws and temperature != 1.0:
            raise MismatchError(
                f"targets of the estimator `{self.estimator.kind}` are only valid at temperature 1",
                got=temperature,
                expected=1.0,
                fix="set loss.temperature to 1.0, or dump with estimator.kind: topk",
            )
        if temperature not in self.temperatures:
            raise MismatchError(
                "the dump holds no tail mass for this temperature",
                got=temperature,
                expected=f"one of {list(self.temperatures)}",
                fix="set loss.temperature to one of these, or dump again with it among `temperatures`",
            )
        return self.temperatures.index(temperature)

    def refuse_other(self, wanted: "Provenance", *, url: str) -> None:
        """Raise MismatchError if `wanted`, what the configuration asks for, differs from this dump in any field."""
        if found := self.differences_to(wanted):
            raise MismatchError(
                f"{url} was made with other settings: {', '.join(found.keys)}",
                got=found.there,
                expected=found.here,
                fix="restore the settings this dump was started with, or choose another dump.url",
            )

    def differences_to(self, wanted: "Provenance") -> "Differences | None":
        """In what the content of a dump that `wanted` describes would be another one than this dump's."""
        here, there = self.content, wanted.content
        if self.made_by is None and wanted.made_by is not None:  # Of the first writers, who hashed the file.
            there["teacher"]["config_sha256"] = wanted.made_by.config_file_sha256
        return differences(here, there)

    def to_json(self) -> bytes:
        """The bytes of run.json; its `checksum` is the sha256 of the canonical JSON without it."""
        content = self.model_dump(mode="json")
        if self.made_by is not None:  # Else all of it is in the fingerprint, which every other file repeats.
            content["checksum"] = hashlib.sha256(canonical_json(content)).hexdigest()
        return canonical_json(content, indent=2)

    @classmethod
    def from_json(cls, data: bytes, *, url: str) -> "Provenance":
        """Parse run.json.

        Raises:
            MismatchError: written by another format version.
            DataError: not a valid run.json, or not the bytes that were written.
        """
        content = parse_json(data, name=f"{url}/run.json")
        refuse_other_version(content, name=f"{url}/run.json")
        stated = {name: value for name, value in content.items() if name != "checksum"}
        provenance = validated(cls, stated, name=f"{url}/run.json")
        if provenance.to_json() != data:
            raise DataError(
                f"{url}/run.json was changed",
                got=f"{len(data)} bytes in another form, or with another checksum",
                expected="the canonical form in which it was written",
                fix="restore the file from a backup, or dump again into another URL",
            )
        return provenance


def canonical_json(value: Any, *, indent: int | None = None) -> bytes:
    """Sorted keys, no NaN, UTF-8, one trailing newline; two equal values give equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=separators, indent=indent)
    return (text + "\n").encode()


def parse_json(data: bytes, *, name: str) -> dict[str, Any]:
    """Parse an object of at most 64 MiB; duplicate keys, NaN and deep nesting are refused with DataError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("duplicate key")
        return dict(pairs)

    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not a number")

    try:
        if len(data) > 64 * 2**20:
            raise ValueError("more than 64 MiB")
        value = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} is not valid",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            expected="a JSON object",
            fix="the file is torn or was not written by this project; run `llm-neo verify`",
        ) from error
    return value


def refuse_other_version(content: Mapping[str, Any], *, name: str) -> None:
    """Raise MismatchError unless `content` is of the version that this code reads and writes."""
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise MismatchError(
            f"{name} has another format version",
            got=version,
            expected=FORMAT_VERSION,
            fix="use the version of llm-neo that wrote this dump, or dump again",
        )


def validated(model: type[M], content: Mapping[str, Any], *, name: str) -> M:
    """`model` from parsed JSON, or DataError that names every bad field."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DataError(
            f"{name} is not valid",
            got=problems[:1000],
            expected=f"the fields of {model.__name__}, see docs/format.md",
            fix="the file is torn or was not written by this project; run `llm-neo verify`",
        ) from error


class Differences(NamedTuple):
    """In what two nested dictionaries differ."""

    keys: list[str]
    """Dotted names."""
    here: str
    """`name = value` of the first, for each."""
    there: str
    """The same of the second."""


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Differences | None:
    """Every leaf that is not the same, or None if all are."""
    one, other = dict(leaves(here)), dict(leaves(there))
    keys = [key for key in sorted(one | other) if one.get(key, ...) != other.get(key, ...)]
    told = ["; ".join(f"{key} = {side.get(key, 'absent')}" for key in keys) for side in (one, other)]
    return Differences(keys, *told) if keys else None


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dictionaries."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
