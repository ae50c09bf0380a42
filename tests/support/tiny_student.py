"""A tiny student, a tiny teacher and the teacher's dump, made in process."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.dumps import random_targets, some_provenance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from storage_schemas.config import Estimator, TopK
from storage_schemas.provenance import Provenance
from storage_schemas.rows import EMPTY, NONFINITE, OK, Row
from storage_schemas.shift import supervised_positions
from storage_schemas.tokenizer import vocab_sha256
from storage_schemas.writer import DumpWriter

VOCAB = 96


def tiny_llama(seed: int, *, tied: bool = False, vocab: int = VOCAB, layers: int = 2) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters, with logits that differ between tokens."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


def tiny_tokenizer(words: str = "w", *, vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` words."""
    tokenizer = Tokenizer(models.WordLevel({f"{words}{i}": i for i in range(vocab)}, unk_token=f"{words}0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=f"{words}0", eos_token=f"{words}1")


def save_student(folder: Path, seed: int = 1, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A student's directory: safetensors and tokenizer."""
    tiny_llama(seed, tied=tied).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_dump(
    url: Path,
    *,
    samples: int = 24,
    samples_per_unit: int = 5,
    estimator: Estimator | None = None,
    temperatures: tuple[float, ...] = (1.0,),
    exact: bool = False,
    units: range | None = None,
    bad_samples: bool = True,
    none_usable: bool = False,
    seal: bool = True,
    first: int = 0,
    **changes: object,
) -> Provenance:
    """A dump of a tiny teacher's targets on random ids, with a sample without supervised tokens and a non-finite one.

    Args:
        url: a local directory.
        samples: number of samples N.
        samples_per_unit: per data file.
        estimator: default `topk` with k = 8.
        temperatures: for the tails.
        exact: store log-probs unrounded.
        units: write these only, for a dump that is still growing.
        bad_samples: whether samples 3 and 7 are empty and non-finite.
        none_usable: whether all samples are empty.
        seal: seal it, if it is complete.
        first: ids and content are those of the samples from this one on.
        changes: of the provenance.
    """
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "lm_head_rows": VOCAB,
        "vocab_sha256": vocab_sha256(tokenizer.get_vocab()),
        "logprob_step": 0.0 if exact else 0.0625,
    }
    provenance = some_provenance(
        samples=samples,
        samples_per_unit=samples_per_unit,
        max_length=64,
        estimator=estimator or TopK(k=8, mass=1.0),
        temperatures=temperatures,
        **settings | changes,
    )
    if first:
        fingerprint = f"{first:064d}"
        provenance = provenance.model_copy(
            update={"corpus": provenance.corpus.model_copy(update={"fingerprint": fingerprint})}
        )
    writer = DumpWriter.open(str(url), provenance)
    folder = url.parent / f"{url.name}-tokenizer"
    tokenizer.save_pretrained(folder)
    writer.put_tokenizer({file.name: file.read_bytes() for file in folder.iterdir()})
    teacher = tiny_llama(0).double()
    bad = (3, 7) if bad_samples else ()
    empty = range(samples) if none_usable else bad[:1]
    for unit in units or range(provenance.units):
        rows = [_row(i, teacher, provenance, first, empty, bad[1:]) for i in provenance.unit_range(unit)]
        writer.commit_unit(unit, rows)
    if seal:
        writer.seal()
    return provenance


@torch.no_grad()
def teacher_logits(input_ids: np.ndarray) -> torch.Tensor:
    """(tokens, VOCAB) float64 logits of the tiny teacher."""
    ids = torch.from_numpy(input_ids.astype(np.int64))[None]
    return tiny_llama(0).double()(input_ids=ids, use_cache=False).logits[0]


def _row(
    index: int,
    teacher: LlamaForCausalLM,
    provenance: Provenance,
    first: int,
    empty: Container[int],
    nonfinite: Container[int],
) -> Row:
    rng = np.random.default_rng([7, first + index])
    length = int(rng.integers(3, 28))
    ids = rng.integers(0, VOCAB, length).astype(np.int32)
    mask = rng.random(length) < 0.6
    mask[0], mask[-1] = False, True
    status = OK
    if index in empty:
        mask[:], status = False, EMPTY
    elif index in nonfinite:
        status = NONFINITE
    targets = None
    if status == OK:
        with torch.no_grad():
            logits = teacher(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
        chosen = logits[supervised_positions(mask).logits].numpy()
        targets = random_targets(provenance, chosen, seed=index)
    return Row(
        sample_index=index, sample_id=f"s{first + index}", status=status, input_ids=ids, loss_mask=mask, targets=targets
    )
