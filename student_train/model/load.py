"""A model's weights: how they are read, and what is refused before they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_class_from_dynamic_module

from storage_schemas.common.code import NO_CODE, Code, importing, refuse_foreign_code, runs_code
from storage_schemas.common.errors import MismatchError, NeoError, first_line
from storage_schemas.common.models import absent, refusing_attention
from student_train.model.student_files import config_file, weight_files
from student_train.summary import FINAL

TRUST = "student.trust_remote_code"
"""Where the user says that code may be run."""


def load_model(
    name: str,
    revision: str | None,
    *,
    dtype: torch.dtype | str,
    attention: str | None = None,
    trust: bool = False,
    quantisation: Any = None,
) -> PreTrainedModel:
    """A causal language model, from safetensors alone.

    Args:
        dtype: of the weights; `auto` is that of the files.
        attention: an `attn_implementation` of transformers; None is the model's default.
        trust: run the code that it brings, see `runs_code`.
        quantisation: how its linear layers are rounded, as transformers is told.

    Raises:
        MismatchError: there is no such model, it is quantised, needs code of its own, or cannot run that attention.
        DataError: a file of it is torn.
    """
    code = runs_code(trust, name, revision, setting=TRUST)
    with _loading(name, code):
        refuse_unloadable(name, revision, attention, trust)
        return AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=code,
            attn_implementation=attention, quantization_config=quantisation,
        )  # fmt: skip


def refuse_unloadable(name: str, revision: str | None, attention: str | None = None, trust: bool = False) -> None:
    """Raise what `load_model` would, as far as it can be known without loading; files are fetched if need be."""
    code = runs_code(trust, name, revision, setting=TRUST)
    with _loading(name, code):
        config = described(name, revision, code)
        if getattr(config, "quantization_config", None) is not None:
            raise MismatchError(
                f"{name} is quantised",
                got=str(config.quantization_config)[:200],
                expected="weights in bf16 or fp32",
                fix="use the unquantised model; student.quantization: nf4 rounds it as it is loaded",
            )
        weight_files(name, revision)
        if attention is not None:
            with torch.device("meta"), refusing_attention(name, attention, setting="student.attn_implementation"):
                AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=code)


def described(name: str, revision: str | None, code: Code = NO_CODE) -> Any:
    """A model's config. With `code`, the code of the model itself is imported too.

    Raises:
        MismatchError: the code is another model's. OSError, ValueError, and whatever the code raises.
    """
    if not code:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=code)
    plain = config_file(name, revision)
    refuse_foreign_code(plain, name)
    with importing(HF_MODULES_CACHE):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=code)
        if place := plain.get("auto_map", {}).get("AutoModelForCausalLM"):
            get_class_from_dynamic_module(place, name, revision=revision)
    return config


@contextmanager
def _loading(name: str, code: Code) -> Iterator[None]:
    """What transformers, or code of the model, says inside becomes a MismatchError that says what to do."""
    try:
        yield
    except NeoError:
        raise
    except Exception as error:
        if not code and not isinstance(error, OSError | ValueError):
            raise
        got = first_line(error) or type(error).__name__
        fix = "convert other weight formats to safetensors first"
        if not Path(name).is_dir():
            got, fix = absent(name, error, setting="the model's name (student.model in a configuration)")
        elif (Path(name) / FINAL).is_dir():
            got, fix = "the directory of a run", f"give {Path(name) / FINAL}, what the run has trained"
        elif not (Path(name) / "config.json").is_file():
            got, fix = "no config.json in it", "give the directory of a model, or of an adapter"
        elif code:
            fix = f"correct its code, which {TRUST} lets run"
        elif "trust_remote_code" in str(error):
            fix = f"read its code, and let it run if you trust it: {TRUST}, or --trust-remote-code of a command"
        raise MismatchError(
            f"the model {name} cannot be loaded",
            got=got,
            expected="a directory or hub id with config.json and *.safetensors",
            fix=fix,
        ) from error
