"""A teacher with code of its own: run if asked for, part of the dump's identity."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.dump_checks import sections
from support.own_code import AUTO_MAP, bring_code, change_code, forget_code
from support.tiny_teachers import save_teacher

from storage_schemas.common.errors import MismatchError
from storage_schemas.reader import Dump
from teacher_dump.config import TeacherSection
from teacher_dump.corpus.preview import load_tokenizer
from teacher_dump.dump import run_dump
from teacher_dump.teachers.teacher import Teacher

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A place of its own for code that transformers copies."""
    forget_code(monkeypatch, tmp_path_factory.mktemp("modules"))


def test_code_is_part_of_the_identity(tmp_path: Path, corpus_file: Path) -> None:
    """The dump names its files; with another number in one, it is another teacher's."""
    own = bring_code(save_teacher(tmp_path / "own"))
    job = sections(tmp_path, corpus_file, own)
    with pytest.raises(MismatchError, match="cannot be loaded"):
        run_dump(**job)
    job["teacher"] = job["teacher"].model_copy(update={"trust_remote_code": True})
    run_dump(**job)
    dump = Dump.open(job["dump"].url)
    assert set(dump.provenance.teacher.code_sha256 or {}) == {"configuration_own.py", "modeling_own.py"}
    assert load_tokenizer(job["teacher"])[1] == dump.provenance.teacher.lm_head_rows
    change_code(own)
    with pytest.raises(MismatchError, match=r"teacher\.code_sha256"):
        run_dump(**job)


def test_without_code_the_identity_is_as_it_was(tmp_path: Path, corpus_file: Path, model_folder: Path) -> None:
    """Dumps of before are continued."""
    job = sections(tmp_path, corpus_file, model_folder)
    run_dump(**job)
    assert b"code_sha256" not in Path(job["dump"].url, "run.json").read_bytes()


@pytest.mark.parametrize("revision", [None, "main", "0123456789ab"])
def test_a_revision_that_may_move_is_refused(revision: str | None) -> None:
    """Before anything is fetched."""
    teacher = Teacher(TeacherSection(model="some/model", revision=revision, trust_remote_code=True))
    with pytest.raises(MismatchError, match=r"teacher\.trust_remote_code would run whatever code"):
        _ = teacher.files


def test_code_of_another_model_and_failing_code_are_refused(tmp_path: Path) -> None:
    """With the words of what failed."""
    foreign = AUTO_MAP | {"AutoConfig": "other/model--configuration_own.OwnConfig"}
    own = bring_code(save_teacher(tmp_path / "foreign"), foreign)
    with pytest.raises(MismatchError, match="takes its code from another model"):
        _ = Teacher(TeacherSection(model=str(own), trust_remote_code=True)).config
    own = bring_code(save_teacher(tmp_path / "failing"))
    (own / "modeling_own.py").write_text("raise RuntimeError('mine')\n")
    with pytest.raises(MismatchError, match="mine"):
        Teacher(TeacherSection(model=str(own), trust_remote_code=True)).refuse_unloadable()


@pytest.mark.parametrize(("line", "says"), [("", "code from another model"), ("raise RuntimeError('mine')", "mine")])
def test_a_preview_runs_the_code_of_the_teacher_alone(
    line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a model beside it, which transformers would take, leaves no marker; what its own code says is told."""
    monkeypatch.chdir(tmp_path)
    marker, other = tmp_path / "marker", bring_code(save_teacher(tmp_path / "other" / "model"))
    with (other / "configuration_own.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'w').close()\n")
    foreign = {"AutoConfig": "other/model--configuration_own.OwnConfig"} if not line else {}
    own = bring_code(save_teacher(tmp_path / "own"), AUTO_MAP | foreign)
    with (own / "configuration_own.py").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(MismatchError, match=says):
        load_tokenizer(TeacherSection(model=str(own), trust_remote_code=True))
    assert not marker.exists()


def test_vllm_runs_none() -> None:
    with pytest.raises(ValidationError, match="backend is vllm"):
        TeacherSection(model="m", trust_remote_code=True, backend="vllm")


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """Stage two has the tokenizer's files alone."""
    own, marker = bring_code(save_teacher(tmp_path / "own")), tmp_path / "marker"
    (own / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    file = own / "tokenizer_config.json"
    changed = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(MismatchError, match="cannot be loaded"):
        _ = Teacher(TeacherSection(model=str(own), trust_remote_code=True)).tokenizer
    assert not marker.exists()
