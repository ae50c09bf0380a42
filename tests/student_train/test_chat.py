"""Replies of models and adapters: transformers' own, with the template, to the learned end."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.tiny_student import save_student, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.views.chat import converse
from storage_schemas.common.errors import MismatchError, UsageError
from student_train.results.chat import Chat

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
    "w5 {{ message['content'] }} w6 {% endfor %}{% if add_generation_prompt %}w7 {% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a chat template."""
    folder = save_student(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def expected_reply(folder: Path, text: str, **settings: object) -> str:
    """By hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def test_reply_is_the_models_own(model: Path) -> None:
    """The template's text goes in, the most likely tokens come out, piece by piece."""
    chat, pieces = Chat(model, device="cpu"), []
    turns = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w3"}]
    turns += [{"role": "user", "content": "w4"}]
    reply = chat.reply(turns, max_new_tokens=12, heard=pieces.append)
    assert reply == expected_reply(model, "w5 w9 w8 w6 w5 w3 w6 w5 w4 w6 w7", max_new_tokens=12, do_sample=False)
    assert len(reply.split()) == 12
    assert "".join(pieces) == reply
    assert len(pieces) > 1


def test_reply_ends_where_the_model_stops(model: Path) -> None:
    """At any of the generation config's ends, which is not part of the reply."""
    turns = [{"role": "user", "content": "w9 w8"}]
    whole = Chat(model, device="cpu").reply(turns, max_new_tokens=12).split()
    stop = whole[4]
    GenerationConfig(eos_token_id=[1, int(stop[1:])], pad_token_id=0).save_pretrained(model)
    assert Chat(model, device="cpu").reply(turns, max_new_tokens=12).split() == whole[: whole.index(stop) + 1]


def test_sampling_is_seeded(model: Path) -> None:
    """The same seed says the same, another one something else."""
    chat, turns = Chat(model, device="cpu"), [{"role": "user", "content": "w9"}]
    one, again, other = (chat.reply(turns, max_new_tokens=20, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


def test_without_a_template_text_is_continued(tmp_path: Path) -> None:
    """As a base model does."""
    folder = save_student(tmp_path / "base")
    chat = Chat(folder, device="cpu")
    assert not chat.has_template
    found = chat.reply([{"role": "user", "content": "w9 w8"}], max_new_tokens=5)
    assert found == expected_reply(folder, "w9 w8", max_new_tokens=5, do_sample=False)


def test_what_the_template_refuses_is_told(model: Path) -> None:
    """In the template's own words."""
    turns = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    with pytest.raises(MismatchError, match="no system message here"):
        Chat(model, device="cpu").reply(turns)


class Echo:
    """Says what it has heard."""

    has_template = True

    def reply(self, messages: Sequence[dict[str, str]], *, heard: Callable[[str], None], **_: object) -> str:
        said = " ".join(message["content"] for message in messages if message["role"] == "user")
        heard(said)
        return said


def conversed(typed: bytes, patch: pytest.MonkeyPatch, *, once: str | None = None, encoding: str = "utf-8") -> bytes:
    """What is printed where this is typed."""
    out = io.BytesIO()
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    converse([("echo", cast(Chat, Echo()))], system=None, once=once)
    sys.stdout.flush()
    return out.getvalue()


def test_bytes_that_are_no_text_and_characters_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end no conversation."""
    assert conversed(b"caf\xe9\n/new\nw4\n", monkeypatch) == "caf\ufffd\nw4\n".encode()
    assert conversed("\u2713 w4\n".encode(), monkeypatch, encoding="ascii") == b"? w4\n"


@pytest.mark.parametrize("text", ["/exit", "/new"])
def test_a_prompt_is_a_text_and_no_command(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert conversed(b"", monkeypatch, once=text) == f"{text}\n".encode()


def test_a_prompt_without_a_text_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded."""
    for prompt in ("", " \n"):
        refused = CliRunner().invoke(app, ["chat", str(tmp_path), "--prompt", prompt])
        assert isinstance(refused.exception, UsageError), refused.output


def test_trust_is_for_all_models_and_a_base_for_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `evaluate`."""
    made: dict[str, Any] = {}

    def chat(model: str, **settings: object) -> Echo:
        made[model] = settings
        return Echo()

    monkeypatch.setattr("student_train.results.chat.Chat", chat)
    one, other, plain = (tmp_path / name for name in ("one", "other", "plain"))
    for folder in (one, other, plain):
        folder.mkdir()
    for adapter in (one, other):
        (adapter / "adapter_config.json").write_text("{}")
    words = ["--prompt", "w4", "--base", "base", "--trust-remote-code"]
    for first, *beside in ([one, plain, other], [plain, one, other]):
        made.clear()
        asked = ["chat", str(first), *(word for name in beside for word in ("--beside", str(name))), *words]
        assert CliRunner().invoke(app, asked).exit_code == 0
        assert {name: settings["base"] for name, settings in made.items()} == {
            str(one): Path("base"), str(other): Path("base"), str(plain): None,
        }  # fmt: skip
        assert all(settings["trust"] for settings in made.values())
    # Where there is none it is refused.
    CliRunner().invoke(app, ["chat", str(plain), *words])
    assert made[str(plain)]["base"] == Path("base")
