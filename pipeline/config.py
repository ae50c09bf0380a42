"""One YAML file configures both stages: its schema, its loading, and error messages that list every problem at once.

Relative paths in a configuration mean relative to the working directory of the command.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from pydantic import BeforeValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pipeline.credentials import secrets_in
from pipeline.elsewhere import RENAMED
from pipeline.problems import UNSAID, Problem, explain, keys, report
from storage_schemas.common.errors import MismatchError, UsageError
from storage_schemas.common.frozen import FrozenModel
from storage_schemas.config import DumpSection, Estimator, Temperatures, TopK, retempered
from storage_schemas.stores.address import local_path
from student_train.config import LossSection, StudentSection, TrainSection
from teacher_dump.config import CorpusSection, SourceSection, TeacherSection, vllm_cannot

MAX_BYTES = 1 << 20
"""Largest configuration file that is read."""

MAX_VALUES = 50_000
"""Values of a configuration file at most."""

T = TypeVar("T")


def _with_kind(value: Any) -> Any:
    return {"kind": "topk", **value} if isinstance(value, Mapping) and "kind" not in value else value


ChosenEstimator = Annotated[Estimator, BeforeValidator(_with_kind)]
"""An estimator as it is written down: without `kind` it is `topk`."""


class HeldoutSection(FrozenModel):
    """Held-out samples: dumped with the same teacher into a second dump, and only ever evaluated on."""

    url: str
    """Where the held-out dump lies."""
    sources: list[SourceSection] = []
    """Read in order and concatenated, like those of `corpus`, whose mask and lengths apply. Stage one only."""
    estimator: ChosenEstimator | None = None
    """Which entries are stored of these samples. Without it those that `estimator` says, or, where that draws, those of
    `topk`: it compares without noise, whatever the student is trained on. Stage one only, and not asked of the dump."""


class Config(FrozenModel):
    """All that the two stages need. A section that a command does not use may be absent."""

    dump: DumpSection
    """Where the dump lies and how it is cut; the one section that every command needs."""
    teacher: TeacherSection | None = None
    """The model whose distribution is stored. Stage one only."""
    estimator: ChosenEstimator = TopK()
    """Which entries of the teacher's distribution are stored. Stage one only: training reads it from the dump."""
    temperatures: Temperatures = (1.0,)
    """Temperatures that a student may later be trained at; each costs one stored tail per supervised token."""
    corpus: CorpusSection | None = None
    """What is distilled on. Stage one only."""
    heldout: HeldoutSection | None = None
    """What the student is evaluated on: before and after by `llm-neo run`, meanwhile by `train.eval_steps`."""
    student: StudentSection | None = None
    """The model that is trained. Stage two only."""
    loss: LossSection = LossSection()
    """What is minimised. Stage two only."""
    train: TrainSection | None = None
    """The optimisation. Stage two only."""

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        problems = list(_disagreements(self))
        if problems:
            raise PydanticCustomError("sections_disagree", "the sections disagree", {"problems": problems})
        return self

    def heldout_config(self, command: str = "dump") -> "Config":
        """The same configuration with the held-out samples, and their estimator, in place of the training corpus.

        Raises:
            MismatchError: no `heldout` with sources, or no `corpus` whose mask and lengths would apply.
        """
        heldout, corpus = need(self.heldout, "heldout", command), need(self.corpus, "corpus", command)
        if not heldout.sources:
            raise MismatchError(
                f"`llm-neo {command}` needs the held-out samples",
                got="heldout without sources",
                expected="heldout.sources, a list like corpus.sources",
                fix="add them; only stage two can do with heldout.url alone",
            )
        return self.model_copy(
            update={
                "dump": self.dump.model_copy(update={"url": heldout.url}),
                "corpus": corpus.model_copy(update={"sources": heldout.sources}),
                "estimator": heldout.estimator or (TopK() if self.estimator.draws else self.estimator),
                "heldout": None,
            }
        )

    def to_yaml(self) -> str:
        """The resolved configuration, defaults included; `load_config` reads it back as the same object."""
        # Without a teacher they are the dump's business: a default that is written down would contradict it.
        unsaid = set() if self.teacher else {"estimator", "temperatures"} - self.model_fields_set
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude=unsaid), sort_keys=False, allow_unicode=True, width=120
        )


def _disagreements(config: Config) -> Iterator[tuple[str, str, object]]:
    """(dotted path, problem, got) of what no section can see alone."""
    estimator = config.estimator
    mixed = [] if config.train is None else [dump.url.rstrip("/") for dump in config.train.dumps]
    for place, urls in (("dump.url", [config.dump.url.rstrip("/")]), ("train.dumps", mixed)):
        if config.heldout is not None and config.heldout.url.rstrip("/") in urls:
            problem = f"must differ from {place}: the student would be evaluated on what it is trained on"
            yield "heldout.url", problem, config.heldout.url
    if config.train is not None and (folder := local_path(config.dump.url)) is not None:
        output = config.train.output.absolute()
        if folder.absolute() in (output, *output.parents):
            problem = f"lies in the dump {config.dump.url} (dump.url); choose a directory outside of it"
            yield "train.output", problem, str(config.train.output)
    if mixed and config.dump.url.rstrip("/") not in mixed:
        yield "train.dumps", f"must name dump.url as well: {config.dump.url}", mixed
    if config.train is not None and config.train.eval_steps and config.heldout is None:
        yield "train.eval_steps", "needs held-out samples: name their dump, heldout.url", config.train.eval_steps
    estimators = {"estimator": estimator}
    if config.heldout is not None and config.heldout.estimator is not None:
        estimators["heldout.estimator"] = config.heldout.estimator
    for place, chosen in estimators.items():
        if retempered(chosen, *config.temperatures):
            problem = f"must be [1.0] with {place}.kind {chosen.kind}: draws cannot be re-tempered, topk can"
            yield "temperatures", problem, list(config.temperatures)
            break
    if config.teacher is not None and config.teacher.backend == "vllm":
        yield from vllm_cannot(estimators, config.temperatures, logsumexp=config.dump.logsumexp)
    # Without a teacher the dump was made elsewhere: only the dump knows its temperatures, and the trainer asks it.
    if config.train is None or not config.train.distils or config.teacher is None:
        return
    if config.loss.divergence != "forward_kl" and estimator.draws:
        problem = f"must be forward_kl with estimator.kind {estimator.kind}: on draws only that is unbiased"
        yield "loss.divergence", problem, config.loss.divergence
    if retempered(estimator, config.loss.temperature):
        problem = f"must be 1.0 with estimator.kind {estimator.kind}: draws cannot be re-tempered, topk can"
        yield "loss.temperature", problem, config.loss.temperature
    elif config.loss.temperature not in config.temperatures:
        yield (
            "loss.temperature",
            f"must be one of temperatures ({list(config.temperatures)}), of the dump",
            config.loss.temperature,
        )


def heldout_elsewhere(config: Config) -> str | None:
    """That of the two dumps one lies on this machine and the other one does not, where stage two may look in vain."""
    urls = {"dump.url": config.dump.url, "heldout.url": config.heldout.url if config.heldout else config.dump.url}
    here = [name for name, url in urls.items() if local_path(url) is not None]
    if len(here) != 1:
        return None
    away = next(name for name in urls if name not in here)
    return f"{here[0]} lies on this machine ({urls[here[0]]}), {away} does not ({urls[away]})"


def need(section: T | None, name: str, command: str) -> T:
    """The section, if it is there.

    Raises:
        MismatchError: it is not.
    """
    if section is None:
        raise MismatchError(
            f"`llm-neo {command}` needs the section `{name}`",
            got="a configuration without it",
            expected=f"`{name}: {{...}}`",
            fix=f"add it to the configuration, or pass its fields: --set {name}.FIELD=VALUE",
        )
    return section


class Loaded(NamedTuple):
    """A configuration, and what of it the user has said."""

    config: Config
    data: dict[str, Any]
    """What file and overrides say together, before defaults."""
    overridden: Collection[str]
    """Dotted names of the overrides."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `load` reads."""
    return load(path, overrides).config


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and validate a configuration.

    Args:
        overrides: `a.b=c`, where c is YAML (`null`, `[1, 2]` and `{k: 8}` work) and a number in the path indexes a
            list. Setting an estimator's `kind` to another one starts that section anew.

    Raises:
        UsageError: no such file, or an override that is not of the form `a.b=c`.
        MismatchError: not YAML, or invalid; lists every problem.
    """
    parsed = [parse_override(text) for text in overrides]
    set_values = {".".join(path): value for path, value in parsed}
    data = read_yaml(path)
    written = copy.deepcopy(data)
    known = {key[-1] for key in keys(Config)}
    problems: list[Problem] = []
    # A kind starts its section anew: first, so that it takes nothing away that is set beside it.
    if not any(place[-1] == "estimator" for place, _ in parsed):
        parsed.sort(key=lambda one: one[0][-2:] != ("estimator", "kind"))
    for place, value in parsed:
        problems += _apply(data, place, value)
    # First, and alone: what is said about other faults may show what stands beside them.
    if secrets := [*_secrets(data, known), *_secrets(set_values, known)]:
        raise report(path, set_values, secrets, written)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += [problem for details in error.errors() for problem in explain(details, data, Config)]
    else:  # The content of a file that is named in there.
        problems += _secrets(config.model_dump(mode="json"), known)
    if problems:
        raise report(path, set_values, problems, written)
    return Loaded(config, data, set_values)


def _secrets(data: Any, known: Collection[str]) -> list[Problem]:
    return [Problem(place, "a secret must not stand here", UNSAID, fix) for place, fix in secrets_in(data, known)]


_YAML_HINTS = {
    r"'\t'": "indent with blanks, not tabs",
    "mapping values are not allowed": "quote a value that holds a colon and a blank",
    "block end": "keys of one section must be indented alike",
    "document start": "one document per file; is this a configuration?",
    "expected ',' or": "a bracket is not closed, or a value needs quotes",
}
"""Part of what YAML complains of -> what it mostly is."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-4 as a number (YAML 1.1 wants a dot in it).

    Aliases that stand for more than `MAX_VALUES` values are refused: a few hundred bytes of them fill any memory.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if _size(node, {}) > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values once its aliases are written out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark if node else None)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str | bytes) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is none. The message says where, and shows nothing of the text.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not YAML"
        # What follows a stray * or ! may be a password.
        hint = next((f" ({hint})" for part, hint in _YAML_HINTS.items() if part in problem), "")
        problem = re.sub(r"'.*'", "", problem, flags=re.DOTALL) if re.search("alias|tag", problem) else problem
        raise ValueError(where + problem.strip() + hint) from None
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "reason", None) or "not YAML") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError("a number or date that cannot be read, or not UTF-8") from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a document has once its aliases are written out."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # Of an alias to what it stands in.
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MiB.

    Raises:
        UsageError: no such file.
        MismatchError: too large, not UTF-8, not YAML, a duplicate key, or not a mapping.
    """
    path = Path(path)
    fix = "`llm-neo init` writes configurations that work"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration {path}", got=error.strerror, expected="a YAML file", fix=fix
        ) from None
    if len(raw) > MAX_BYTES:
        raise MismatchError(f"{path} is too large for a configuration", got="> 1 MiB", expected="<= 1 MiB", fix=fix)
    try:
        data = _parse(raw)
    except ValueError as error:
        raise MismatchError(f"{path} is not a valid YAML file", got=error, fix=fix) from None
    if not isinstance(data, dict):
        kind = "an empty file" if data is None else type(data).__name__
        if isinstance(data, str) and (path.parent / data).is_file():  # As some archives keep links.
            kind, fix = "the name of another file", f"give that file: {(path.parent / data).resolve()}"
        raise MismatchError(f"{path} is not a configuration", got=kind, expected="a mapping of sections", fix=fix)
    return data


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """`a.b=c` as a path and a YAML value.

    Raises:
        UsageError: not of that form, or c is not YAML.
    """
    dotted, equals, value = text.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    expected = "--set section.field=VALUE, where VALUE is YAML"
    # Of what cannot be understood no value is shown: it may be a secret.
    shown = "--set " + (re.match(r"[\w.]*", dotted) or [""])[0]
    if not equals or not all(path):
        raise UsageError("an override that cannot be understood", got=f"{shown}...", expected=expected)
    try:
        parsed = _parse(value)
        if _glued(parsed):
            raise ValueError("a colon needs a blank after it: {key: value}")
        return path, parsed
    except ValueError as error:
        raise UsageError(
            "an override whose value is not YAML", got=f"{shown}=...: {error}", expected=expected
        ) from None


def _glued(value: Any) -> bool:
    """Whether a mapping in there looks like `{key:value}`, which YAML reads as a key without a value."""
    if isinstance(value, dict):
        return any((":" in key and inner is None) or _glued(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_glued, value))


def _apply(data: dict[str, Any], path: Sequence[str], value: Any) -> list[Problem]:
    """Set one value in place; missing sections on the way are made."""
    dotted = ".".join(path)
    node: Any = data
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        key: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                hint = f"write the whole list: --set '{'.'.join(path[:depth])}=[...]'"
                return [Problem(dotted, f"no such element; the list has {len(node)}", part, hint)]
            key = int(part)
        elif not isinstance(node, dict):
            return [Problem(dotted, f"{'.'.join(path[:depth])} is a value, not a section", node)]
        if last:
            if dotted.endswith("estimator.kind") and node.get("kind", "topk") != value:
                node.clear()
            if isinstance(node, dict):  # The same setting under its other name.
                for old, new in RENAMED.items():
                    if dotted in (old, new):
                        node.pop((new if dotted == old else old).rpartition(".")[2], None)
            node[key] = value
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
    return []
