"""Depth pruning: which layers stay, and that exactly those are saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.prune import Pruning, layers_to_keep, parse_keep, prune
from storage_schemas.common.errors import DataError, MismatchError, UsageError
from student_train.results.saved import read_record, write_record


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        (30, 24, [*range(12), *range(18, 30)]),
        (30, 21, [*range(11), *range(20, 30)]),
        (4, 2, [0, 3]),
        (4, 3, [0, 1, 3]),
        (4, 1, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_one_block_goes_from_the_middle(layers: int, keep: int, expected: list[int]) -> None:
    assert layers_to_keep(layers, keep) == expected


def test_every_number_of_layers_keeps_the_first_and_the_last() -> None:
    for layers in range(2, 40):
        for keep in range(2, layers + 1):
            kept = layers_to_keep(layers, keep)
            assert len(kept) == keep
            assert kept == sorted(set(kept))
            assert (kept[0], kept[-1]) == (0, layers - 1)


@pytest.mark.parametrize("keep", [0, -1, 5])
def test_impossible_numbers_are_refused(keep: int) -> None:
    with pytest.raises(UsageError, match="1 to 4"):
        layers_to_keep(4, keep)


def test_layers_named_by_hand() -> None:
    assert parse_keep("0, 1,3", 4) == [0, 1, 3]
    assert parse_keep("0-1,3-3", 4) == [0, 1, 3]
    for text in ("", "a", "1,0", "0,0", "4", "3-1", "0,3-1", "-1", "0,"):
        with pytest.raises(UsageError):
            parse_keep(text, 4)


@pytest.mark.parametrize("text", ["0-1000000000000", "0-999999999", "9" * 5000])
def test_numbers_far_beyond_the_layers_are_refused_at_once(text: str) -> None:
    with pytest.raises(UsageError, match=r"from 0 to 3, such as 0-1,3$"):
        parse_keep(text, 4)


@pytest.mark.parametrize("layers", range(1, 9))
def test_the_example_of_layers_fits_the_model(layers: int) -> None:
    with pytest.raises(UsageError) as refused:
        parse_keep("none", layers)
    assert parse_keep(str(refused.value.expected).partition("such as ")[2], layers)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=5, tie_word_embeddings=True, **sizes)
    path = tmp_path_factory.mktemp("models") / "model"
    # Several files, as large models have.
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("of the source")
    return path


def logits_with(model: Path, kept: list[int], ids: torch.Tensor) -> torch.Tensor:
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[i] for i in kept)
    return whole(ids, use_cache=False).logits


def test_the_pruned_model_computes_what_the_kept_layers_compute(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    pruning = prune(str(model), out, layers=3)
    assert pruning == Pruning(source="model", source_layers=5, kept=(0, 1, 4), source_sha256=pruning.source_sha256)
    assert str(pruning) == "3 of 5 layers kept: 0-1, 4; dropped: 2-3"
    pruned, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert pruned.config.num_hidden_layers == 3
    ids = torch.arange(12)[None]
    torch.testing.assert_close(pruned(ids).logits, logits_with(model, [0, 1, 4], ids))
    # It says what was done, keeps the tokenizer, and leaves no trace of the work.
    assert "0-1, 4" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["pruned_layers_kept"] == [0, 1, 4]
    assert (out / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_pruning_again_does_nothing_and_pruning_otherwise_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    first = prune(str(model), out, keep="0,4")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prune(str(model), out, layers=2) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(MismatchError, match="another pruned model"):
        prune(str(model), out, layers=3)
    with pytest.raises(MismatchError, match="not a pruned model"):
        prune(str(model), tmp_path, layers=3)


def test_another_source_of_the_same_name_is_refused(model: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "pruned", tmp_path / "model"
    first = prune(str(model), out, layers=2)
    shutil.copytree(model, other)
    assert prune(str(other), out, layers=2) == first, "a copy is the same model"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with pytest.raises(MismatchError, match="another pruned model"):
        prune(str(other), out, layers=2)
    shutil.copyfile(model / "config.json", other / "config.json")
    weights = sorted(other.glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    with pytest.raises(MismatchError, match="another pruned model") as refused:
        prune(str(other), out, layers=2)
    assert refused.value.got != refused.value.expected
    # A record of before does not say it.
    old = json.loads((out / "pruning.json").read_text())
    del old["source_sha256"]
    (out / "pruning.json").write_text(json.dumps(old))
    assert prune(str(model), out, layers=2) == first


def test_the_record_of_a_run_is_not_copied(model: Path, tmp_path: Path) -> None:
    """It holds the hashes of the files of `final`, which those of the pruned model are not."""
    final = tmp_path / "final"
    shutil.copytree(model, final)
    write_record(final, None)
    prune(str(final), tmp_path / "out", layers=3)
    assert read_record(final) is not None
    assert read_record(tmp_path / "out") is None


def test_what_is_said_per_layer_loses_the_same_layers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(
        vocab_size=64, num_hidden_layers=4, head_dim=8, layer_types=kinds, max_window_layers=4, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    prune(str(tmp_path / "model"), tmp_path / "out", keep="0,3")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("said", [{}, {"layer_types": None}])
def test_kinds_that_follow_from_the_layers_numbers_go_with_their_layers(said: dict[str, None], tmp_path: Path) -> None:
    """As in the config.json of older models, which do not say `layer_types`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=64, num_hidden_layers=4, head_dim=8, sliding_window=4, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    told = json.loads(file.read_text())
    assert told.pop("layer_types") == ["sliding_attention", "full_attention"] * 2
    file.write_text(json.dumps(told | said))
    prune(str(tmp_path / "model"), tmp_path / "out", keep="1,3")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.layer_types == ["full_attention", "full_attention"]


def test_what_cannot_be_pruned_is_refused_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exactly one of"):
        prune(str(model), tmp_path / "out")
    with pytest.raises(UsageError, match="exactly one of"):
        prune(str(model), tmp_path / "out", layers=2, keep="0,1")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"config\.json"):
        prune(str(empty), tmp_path / "out", layers=2)
    (empty / "config.json").write_text('{"num_hidden_layers": 4}')
    with pytest.raises(DataError, match="no weights"):
        prune(str(empty), tmp_path / "out", layers=2)
    (empty / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(DataError, match="is torn"):
        prune(str(empty), tmp_path / "out", layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
