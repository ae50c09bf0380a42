"""run.json: what made a dump. Its canonical hash is the dump's fingerprint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from storage_schemas.canonical import Differences, ProvenJson, canonical_json, differences, digest, with_checksum
from storage_schemas.common.errors import MismatchError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import Adaptive, Estimator, Sampled, Temperatures, TopK, retempered

IMPORT = "import"
"""Name of the engine of a dump that was imported from another project's store: nobody here has seen its teacher run."""
IN_MEMORY = "state_dict"
"""In place of a file's name: the hash is of the tensors of a model that was in memory."""


class _Identity(FrozenModel):
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
    """Hash of each weight file, by file name; or of a model that was in memory, under `state_dict` alone."""
    dtype: str
    """Compute dtype of the forward pass."""
    lm_head_rows: int = Field(alias="head_size", ge=1, lt=2**31)
    """Rows of the LM head, `head_size` in run.json: every target id is below it."""
    code_sha256: dict[str, str] | None = None
    """Hash of each file of code that the teacher brought and that was run; null: none."""
    model: str | None = None
    """Of the first writers alone; see `MadeBy.model`."""
    revision: str | None = None
    """Of the first writers alone; see `MadeBy.revision`."""

    @property
    def in_memory(self) -> bool:
        """Whether it was a model object, which no path or hub id leads to."""
        return IN_MEMORY in self.weights_sha256


class TokenizerIdentity(FrozenModel):
    """The tokenizer that made the ids."""

    vocab_size: int = Field(ge=1, lt=2**31)
    """Number of ids that the tokenizer knows; the head may be padded beyond it."""
    vocab_sha256: str
    """Hash of the id -> token map, see `storage_schemas.tokenizer`."""
    chat_template_sha256: str | None
    """Hash of the chat template."""


class CorpusIdentity(FrozenModel):
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


class MadeBy(FrozenModel):
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


class Provenance(_Identity, ProvenJson):
    """Everything that determines the content of a dump, and a note on what made it."""

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
        return digest(self.model_dump(mode="json", exclude={"made_by"}))

    @property
    def origin(self) -> MadeBy:
        """Where the teacher lay and what it ran with."""
        if self.made_by is not None:
            return self.made_by
        versions = {} if self.engine.version is None else {self.engine.name: self.engine.version}
        return MadeBy(model=str(self.teacher.model), revision=self.teacher.revision, versions=versions)

    @property
    def imported(self) -> str | None:
        """The layout that it was imported from; None: this project ran the teacher."""
        return str((self.engine.arguments or {}).get("layout")) if self.engine.name == IMPORT else None

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
        if retempered(self.estimator, temperature):
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
                fix="choose one of these (loss.temperature, --temperature), or dump again with it among `temperatures`",
            )
        return self.temperatures.index(temperature)

    def refuse_other(self, wanted: "Provenance", *, url: str) -> None:
        """Raise MismatchError if `wanted`, what the configuration asks for, differs from this dump in any field."""
        refuse_differences(f"{url} was made with other settings", self.differences_to(wanted))

    def differences_to(self, wanted: "Provenance") -> Differences | None:
        """In what the content of a dump that `wanted` describes would be another one than this dump's."""
        here, there = self.content, wanted.content
        if self.made_by is None and wanted.made_by is not None:  # Of the first writers, who hashed the file.
            there["teacher"]["config_sha256"] = wanted.made_by.config_file_sha256
        return differences(here, there)

    def to_json(self) -> bytes:
        """The bytes of run.json; its `checksum` is the sha256 of the canonical JSON without it."""
        content = self.model_dump(mode="json")
        if self.made_by is not None:  # Else all of it is in the fingerprint, which every other file repeats.
            content = with_checksum(content)
        return canonical_json(content, indent=2)


_RESTORE_DUMP = "restore what it was started with (of held-out samples: heldout.estimator), or choose another dump.url"


def refuse_differences(what: str, found: Differences | None, *, fix: str = _RESTORE_DUMP) -> None:
    """Raise MismatchError that names each difference; `there` is told as got, `here` as expected."""
    if found:
        raise MismatchError(f"{what}: {', '.join(found.keys)}", got=found.there, expected=found.here, fix=fix)
