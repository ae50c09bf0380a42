"""Talk with a model or an adapter: its own chat template, and an end where it has learned to stop."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from storage_schemas.common.errors import MismatchError
from student_train.model.tokenizers import load_tokenizer, tokenizer_in
from student_train.results.end_of_turn import GENERATION
from student_train.results.evaluate import device_named, load_ready

Messages = Sequence[Mapping[str, str]]
"""`role` and `content` of each turn so far."""


class Chat:
    """A model that answers."""

    def __init__(
        self, model: str | Path, *, base: Path | None = None, device: str = "auto", trust: bool = False
    ) -> None:
        """Load it.

        Args:
            model: directory or hub id of a model, or directory of a peft adapter.
            base: where an adapter's base model lies, if not where the adapter says.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
            trust: run the code that the model brings; that of an adapter's base if `base` names it.

        Raises:
            MismatchError: no such model or device, or it has no tokenizer.
            DataError: a file of it is torn or was changed.
        """
        self._device = device_named(device)
        loaded, source, revision = load_ready(model, base, device=self._device, trust=trust)
        self._model = loaded.to(self._device)
        fix = "give a model that was saved with its tokenizer"
        own = tokenizer_in(Path(model))
        self._tokenizer: PreTrainedTokenizerBase = own or load_tokenizer(source, revision, fix=fix)
        if (Path(model) / GENERATION).is_file():  # An adapter's, which peft does not load.
            self._model.generation_config = GenerationConfig.from_pretrained(str(model))

    @property
    def has_template(self) -> bool:
        """Whether turns can be told apart; if not, text is continued as it is."""
        return bool(self._tokenizer.chat_template)

    @torch.inference_mode()
    def reply(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        heard: Callable[[str], None] = lambda _: None,
    ) -> str:
        """What the model says next.

        Args:
            messages: the turns so far; without a chat template their texts, one after the other, are continued.
            temperature: of sampling. 0: always the most likely token.
            heard: called with each piece of text as soon as it is known.

        Raises:
            MismatchError: the chat template does not take these turns, or they are too long.
        """
        inputs = self._encoded(messages)
        settings: dict[str, Any] = {"do_sample": temperature > 0.0, "max_new_tokens": max_new_tokens}
        if temperature > 0.0:
            settings["temperature"] = temperature
            torch.manual_seed(seed)
        streamer = _Streamer(self._tokenizer, heard)
        try:
            self._model.generate(**inputs, **settings, streamer=streamer)
        except IndexError as error:  # Beyond a table of learned positions.
            raise MismatchError(
                "the conversation is longer than this model's positions",
                got=f"{inputs['input_ids'].shape[1]} tokens, and up to {max_new_tokens} of the reply",
                expected=f"at most {getattr(self._model.config, 'max_position_embeddings', 'its table of positions')}",
                fix="begin anew, or lower --max-new-tokens",
            ) from error
        return streamer.text

    def _encoded(self, messages: Messages) -> Any:
        tokenizer: Any = self._tokenizer
        if not self.has_template:
            text = "".join(message["content"] for message in messages)
            return tokenizer(text, return_tensors="pt").to(self._device)
        try:
            encoded = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except Exception as error:  # Templates raise what they like: that roles must alternate, for one.
            raise MismatchError(
                "the model's chat template does not take this conversation",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                expected="turns that the template knows",
                fix="leave out --system, or use another model",
            ) from error
        return encoded.to(self._device)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands each finished piece of a reply on, and keeps the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, heard: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._heard = "", heard

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        if text:
            self.text += text
            self._heard(text)
