"""The student: how it is loaded, and its forward pass from a micro-batch to sums of losses."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from torch import Tensor, nn

from storage_schemas.common.errors import MismatchError
from storage_schemas.logits import body_of, finish_logits, head_rows
from storage_schemas.provenance import Provenance
from storage_schemas.reader import Dump
from student_train.config import LossSection, StudentSection, TrainSection
from student_train.data.batch import TrainBatch
from student_train.model.adapter import ALONE, Part, attach, initial_factors
from student_train.model.attention import looking_for_packed_samples
from student_train.model.head import HeadSpec, fused_head_loss
from student_train.model.load import load_model
from student_train.model.probes import refuse_mixed_samples, refuse_unknown_head
from student_train.model.quantised import keep_numbers, quantisation, refuse_unfit_quantisation, refuse_unquantised
from student_train.model.router import RouterLoss
from student_train.model.scaling import scale_between
from student_train.model.tokenizers import refuse_tokenizer

log = logging.getLogger(__name__)

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[object]]
"""Makes parameters whole for a while, where they are spread over ranks."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FILES, START = "student.files", "student.adapter"
"""Keys of a checkpoint's identity: the student's `student_files.identity`, and what it began from."""


class Head(nn.Module):
    """The language-model head, and the loss on top of it.

    A trainable weight is a parameter of this module, the very object that the student holds, so that ZeRO-3 gathers
    it here too and sums the gradients of all its uses. A frozen one is kept out of ZeRO-3's sight and gathered around
    the function alone: as a parameter it would be gathered once more in every backward pass, which does not read it.
    """

    def __init__(self, embeddings: nn.Module, *, losses: tuple[LossSection, ...], spec: HeadSpec) -> None:
        super().__init__()
        self.losses, self.spec = losses, spec
        self.gather: Gather = lambda _: nullcontext()
        weight: nn.Parameter = embeddings.weight  # type: ignore[assignment]
        bias: nn.Parameter | None = getattr(embeddings, "bias", None)
        self.trained = weight.requires_grad
        if self.trained:
            self.weight, self.bias = weight, bias
        else:
            self._frozen = (weight, bias)

    def forward(self, hidden: Tensor, batch: TrainBatch | None) -> tuple[Tensor, Tensor]:
        """Loss sum, and of each dump the sums of `HeadLoss`; without a batch, logits twice."""
        weight, bias = (self.weight, self.bias) if self.trained else self._frozen
        whole = nullcontext() if self.trained else self.gather([p for p in (weight, bias) if p is not None])
        with whole:
            if batch is None:
                logits = self._logits(hidden, weight, bias)
                return logits, logits
            pieces = torch.split(hidden, [len(targets) for targets in batch.parts])
            each = [
                fused_head_loss(piece, weight, targets, loss=loss, head=self.spec, bias=bias)
                for piece, targets, loss in zip(pieces, batch.parts, self.losses, strict=True)
            ]
        parts = torch.stack([torch.stack([x.detach().double() for x in sums]) for sums in each])
        return torch.stack([sums.loss for sums in each]).sum(), parts

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias).float()
        finish_logits(logits, scale=self.spec.scale, softcap=self.spec.softcap)
        return logits


class Distilled(nn.Module):
    """Student and loss: what DeepSpeed trains. Logits exist for chunks of supervised tokens only."""

    def __init__(self, student: nn.Module, *, losses: tuple[LossSection, ...], head: HeadSpec) -> None:
        """Wrap a causal language model of transformers, or a PeftModel around one. `losses` are those of each dump."""
        super().__init__()
        self.student = student
        self.head = Head(self.causal.get_output_embeddings(), losses=losses, spec=head)
        self.router_loss: RouterLoss | None = None
        self.packed = True
        """Whether rows may hold several samples one after the other."""

    @property
    def causal(self) -> Any:
        """The causal language model of transformers inside."""
        return causal_of(self.student)

    def forward(self, batch: TrainBatch) -> tuple[Float[Tensor, ""], Float[Tensor, " sums"]]:
        """Sums over the micro-batch: the loss to differentiate, and of each dump the sums of `HeadLoss` as float64.

        While training, the loss of a mixture of experts holds that of its routers, see `RouterLoss`. This loss, and
        what its routers add without their coefficient, 0 for other models, then stand behind the other sums.
        """
        states = self._states(batch.input_ids, batch.position_ids)
        loss, parts = self.head(batch.select(states.last_hidden_state), batch)
        if not self.training:
            return loss, parts.flatten()
        routers = loss.new_zeros(())
        # On a filler too, with weight 0: ZeRO-3 hangs unless all ranks do the same backward pass.
        if self.router_loss is not None:
            routers = self.router_loss(states.router_logits, batch.mask) * batch.supervised
            loss = loss + self.router_loss.coefficient * routers
        return loss, torch.cat([parts.flatten(), torch.stack([loss, routers]).detach().double()])

    @torch.no_grad()
    def logits(
        self, input_ids: Int64[Tensor, "batch seq"], position_ids: Int64[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Full logits of a few tokens, for comparisons; `position_ids` count from 0 in each row unless given."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.head(self._states(input_ids, position_ids).last_hidden_state, None)[0]  # type: ignore[no-any-return]

    def hidden(self, batch: TrainBatch) -> Float[Tensor, "n hidden"]:
        """Last hidden states of a batch's supervised tokens, in the targets' order."""
        return batch.select(self._states(batch.input_ids, batch.position_ids).last_hidden_state)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Trained parameters, by their name in the student."""
        return [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]

    def _states(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        body = body_of(self.causal, role="student")
        # Without a mask and a cache, transformers keeps apart what position ids say is apart.
        with looking_for_packed_samples(self.packed):
            return body(input_ids=input_ids, position_ids=position_ids, use_cache=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A student that is ready to be trained."""

    module: Distilled
    initial: dict[str, Tensor]
    """What the adapter's start has taken out of the base weights, see `adapter.initial_factors`."""
    start: str | None = None
    """Hash of the weights of the adapter that it began from; on the main rank alone."""
    files: dict[str, str] = field(default_factory=dict)
    """Identity of the files it came from, see `student_files.identity`; on the main rank alone."""

    def identified(self) -> dict[str, Any]:
        """What identifies it in a checkpoint's identity."""
        return {FILES: self.files, START: self.start}


def load_student(
    student: StudentSection,
    losses: Sequence[LossSection],
    train: TrainSection,
    provenance: Provenance,
    *,
    initial: Mapping[str, Tensor] | None = None,
    part: Part = ALONE,
) -> Student:
    """Load the student and make it ready for its arm.

    `losses` are those of each dump, and `provenance` is what these agree on. The arms `sft` and `lora` use the
    cross-entropy alone, as with alpha 0. For `initial` and `part` see `adapter.attach`.

    Raises:
        MismatchError: the model cannot be loaded, or is of a kind that cannot be trained here.
    """
    dtype, attention = DTYPES[train.precision], student.attn_implementation
    # At ZeRO-3 weights stay in the mapped file, whose pages all ranks of a node share, until `engine` casts and spreads
    # them one by one: so they are read in the file's dtype where that changes no bit. peft rounds an adapter's start to
    # the dtype of its base, so in fp32 it would; PiSSA rounds what it leaves of the base weights.
    decomposed = train.lora and student.lora.variant == "pissa"
    mapped = train.zero_stage == 3 and train.precision == "bf16" and not decomposed
    refuse_unfit_quantisation(student, train)
    base = load_model(
        student.model, student.revision, dtype="auto" if mapped else dtype, attention=attention,
        trust=student.trust_remote_code, quantisation=quantisation(student, dtype),
    )  # fmt: skip
    if student.quantization is not None:
        refuse_unquantised(base)
        keep_numbers(base)
    if base.dtype == torch.float16:  # As the file has it; its range is too small.
        base = base.to(dtype)
    base.config.use_cache = False
    model: nn.Module = base
    start: dict[str, Tensor] = {}
    if train.lora:
        model = attach(base, student.lora, seed=train.seed, initial=initial, part=part)
        start = initial_factors(model, student.lora)
        scale_between(model)
    else:
        base.requires_grad_(True)
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if train.neftune_noise_alpha is not None:
        add_noise(base.get_input_embeddings(), train.neftune_noise_alpha)
    minimised = losses if train.distils else [loss.model_copy(update={"alpha": 0.0}) for loss in losses]
    module = distilled(model, minimised, provenance, chunk_tokens=train.head_chunk_tokens, compile=train.compile)
    module.router_loss, module.packed = RouterLoss.of(base), train.packing
    if train.packing:
        refuse_mixed_samples(module)
    return Student(module=module, initial=start)


LOGITS_BYTES = 2**28
"""Of the logits of a pass of the head, in float32, where the number of its tokens is not said."""


def distilled(
    student: nn.Module, losses: Sequence[LossSection], provenance: Provenance, *, chunk_tokens: int | None = None,
    compile: bool = False,
) -> Distilled:  # fmt: skip
    """A student with the losses on the dumps' targets. Raises MismatchError if its head is not understood."""
    valid_vocab = min(vocab_rows(student), provenance.teacher.lm_head_rows)
    config, chunk_tokens = causal_of(student).config, chunk_tokens or max(1, LOGITS_BYTES // (4 * valid_vocab))
    head = HeadSpec.of(config, valid_vocab=valid_vocab, chunk_tokens=chunk_tokens, compile=compile)
    module = Distilled(student, losses=tuple(losses), head=head)
    refuse_unknown_head(module)
    return module


def add_noise(embeddings: nn.Module, alpha: float) -> None:
    """Uniform noise on (batch, seq, hidden) embeddings while training, of alpha / sqrt(seq * hidden) at most (NEFTune,
    arXiv 2310.05914, algorithm 1)."""

    def noisy(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        most = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.empty_like(output).uniform_(-most, most)

    embeddings.register_forward_hook(noisy)


def causal_of(student: nn.Module) -> Any:
    """The causal language model of transformers inside."""
    return student.get_base_model() if isinstance(student, PeftModel) else student


def vocab_rows(student: nn.Module) -> int:
    """Rows of its language-model head, padding included."""
    return head_rows(causal_of(student))


def refuse_other_dump(student: nn.Module, source: str, revision: str | None, dump: Dump) -> list[str]:
    """Raise MismatchError unless the student, loaded from `source`, can take the dump's rows and means its ids; the
    tokens that are new to it."""
    refuse_long_rows(student, dump.provenance.corpus.max_length)
    return refuse_tokenizer(source, revision, dump.read_tokenizer(), head_rows=vocab_rows(student))


def refuse_long_rows(student: nn.Module, longest: int) -> None:
    """Raise MismatchError if rows may be longer than a table of learned positions, and warn beyond a trained length.

    `longest` is the dump's `corpus.max_length`, in tokens.
    """
    causal = causal_of(student)
    known = getattr(causal.config, "max_position_embeddings", None)
    if not known or longest <= known:
        return
    others = (m for m in causal.modules() if isinstance(m, nn.Embedding) and m is not causal.get_input_embeddings())
    # OPT's table has two rows more than it has positions.
    if any(known <= table.num_embeddings <= known + 2 for table in others):
        raise MismatchError(
            f"{type(causal).__name__} has learned positions, and fewer than the dump's rows may have tokens",
            got=f"rows of up to {longest} tokens (corpus.max_length of the dump)",
            expected=f"at most {known}",
            fix=f"dump with corpus.max_length: {known}, or choose another student",
        )
    log.warning(
        "rows may have %d tokens (corpus.max_length of the dump), and the student was made for %d positions",
        longest, known,
    )  # fmt: skip
