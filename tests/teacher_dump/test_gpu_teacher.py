"""Stage one on a GPU: the targets of the CPU, by every estimator and architecture, in little memory too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from support.gpus import need_gpus
from support.rounding import BELOW_16, LOGPROB
from support.tiny_teachers import ARCHITECTURES, VOCABULARY, sample_of, save_teacher, tiny_model

from storage_schemas.common.errors import MismatchError
from storage_schemas.config import Adaptive, Estimator, Sampled, TopK
from storage_schemas.provenance import Recipe
from storage_schemas.targets import Targets, concatenate
from teacher_dump.config import TeacherSection
from teacher_dump.estimators.estimate import estimate, gather
from teacher_dump.teachers.teacher import Teacher

pytestmark = need_gpus()

EVERYTHING = Recipe(estimator=TopK(k=VOCABULARY, mass=1.0), temperatures=(1.0, 2.0), logsumexp=True)
ESTIMATORS: dict[str, Estimator] = {
    "topk": TopK(k=32, mass=1.0),
    "topk of a mass": TopK(k=64, mass=0.6),
    "adaptive": Adaptive(kind="adaptive", mass=0.6, k_max=16, tail_draws=8),
    "sampled": Sampled(kind="sampled", draws=50),
}


def teacher_of(folder: Path, **options: Any) -> Teacher:
    return Teacher(TeacherSection(model=str(folder), **({"dtype": "float32", "device": "auto"} | options)))


def assert_close(found: Targets, expected: Targets, *, atol: float) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    if expected.counts is not None:
        np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=atol)
    np.testing.assert_allclose(found.tail_logprob, expected.tail_logprob, atol=atol)
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, atol=atol)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_equal_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    save_teacher(tmp_path, name)
    samples = [sample_of(n, index=i) for i, n in enumerate([19, 7, 30])]
    here, there = (teacher_of(tmp_path, device=device) for device in ("auto", "cpu"))
    assert here.device.type == "cuda"
    for found, expected in zip(here.targets(samples, EVERYTHING), there.targets(samples, EVERYTHING), strict=True):
        assert found is not None
        assert expected is not None
        assert_close(found, expected, atol=2 * LOGPROB)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("vocabulary", [333, 128256])
def test_estimates_of_the_same_logits_are_those_of_the_cpu(name: str, vocabulary: int) -> None:
    """Heads to the last id. A draw looks for a point in a sum over the vocabulary, whose last bits are a machine's own:
    one in a thousand may be the neighbour."""
    n = 257
    logits = 3 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(0))
    place = {"sample_index": np.arange(n) // 7, "position": np.arange(n) % 7}
    recipe = Recipe(estimator=ESTIMATORS[name], temperatures=(1.0,) if ESTIMATORS[name].draws else (1.0, 2.0))
    found, expected = (
        gather([estimate(logits.to(device, copy=True), recipe, **place)], logsumexp=True)()[0]
        for device in ("cuda", "cpu")
    )
    if not ESTIMATORS[name].draws:
        assert_close(found, expected, atol=4 * BELOW_16)
        return
    np.testing.assert_array_equal(found.head_size, expected.head_size)
    moved = 0
    for i in range(n):
        here, there = found.slice(i, i + 1), expected.slice(i, i + 1)
        np.testing.assert_array_equal(here.ids[: here.head_size[0]], there.ids[: there.head_size[0]])
        drawn = [np.repeat(t.ids, np.maximum(t.counts, 0))[: int(t.counts.sum())] for t in (here, there)]
        assert len(drawn[0]) == len(drawn[1])
        moved += int((drawn[0] != drawn[1]).sum())
    assert moved <= n * 50 / 1000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "phi"])
def test_logits_of_16_bit_factors_are_float32(name: str, dtype: str, tmp_path: Path) -> None:
    """Of large logits, rounding the product to 16 bits would cost more than the fidelity gate allows."""
    model = tiny_model(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    model.save_pretrained(tmp_path)
    save_teacher(tmp_path / "tokenizer", name)
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    teacher = teacher_of(tmp_path, dtype=dtype)
    samples = [sample_of(n, index=i) for i, n in enumerate([40, 31, 60])]
    kept = []
    teacher.model.get_decoder().register_forward_hook(lambda module, args, output: kept.append(output[0]))
    found = concatenate(teacher.targets(samples, Recipe(estimator=EVERYTHING.estimator, logsumexp=True)))
    head = teacher.model.get_output_embeddings()
    states = torch.cat([kept[-1][i, np.flatnonzero(s.loss_mask) - 1] for i, s in enumerate(samples)]).double()
    exact = states @ head.weight.double().t() + (0 if head.bias is None else head.bias.double())
    cap = getattr(teacher.config, "final_logit_softcapping", None)
    exact = exact if cap is None else cap * torch.tanh(exact / cap)
    np.testing.assert_allclose(found.logprobs.reshape(len(exact), -1), exact.log_softmax(1).cpu().numpy(), atol=LOGPROB)


@pytest.fixture
def little_memory() -> Any:
    """Of the GPU's, 160 MiB are for this process."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(160 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("little_memory")
def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_teacher(tmp_path)
    teacher = teacher_of(tmp_path, dtype="float32")
    samples = [sample_of(90, index=i) for i in range(4096)]
    found = teacher.targets(samples, Recipe(estimator=TopK(k=8), logsumexp=True))
    assert "halving such batches" in caplog.text
    assert len(found) == len(samples)
    for place in (0, 1, 2047, 2048, 4095):
        (alone,) = teacher.targets([samples[place]], Recipe(estimator=TopK(k=8), logsumexp=True))
        assert_close(found[place], alone, atol=LOGPROB)


@pytest.mark.usefixtures("little_memory")
def test_what_can_never_fit_is_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path / "small", max_position_embeddings=2**19)
    one = sample_of(400_000)
    with pytest.raises(MismatchError, match="alone does not fit into the memory of cuda"):
        teacher_of(tmp_path / "small").targets([one], EVERYTHING)
    save_teacher(tmp_path / "large", intermediate_size=500_000)
    with pytest.raises(MismatchError, match="out of memory"):
        _ = teacher_of(tmp_path / "large").model


@pytest.mark.parametrize(
    "way",
    [{"sharding": "device_map"}, {"sharding": "tensor"}, {"sharding": "zero3"}, {"sharding": "zero3", "offload": True}],
    ids=str,
)
def test_a_spread_teacher_on_one_gpu(way: dict[str, Any], tmp_path: Path) -> None:
    save_teacher(tmp_path)
    samples = [[sample_of(length, index=length) for length in lengths] for lengths in ([9, 31], [90])]
    recipe = Recipe(estimator=TopK(k=40, mass=1.0), temperatures=(1.0, 2.0), logsumexp=True)
    if way["sharding"] == "device_map":
        found = [teacher_of(tmp_path, **way).targets(batch, recipe) for batch in samples]
    else:
        case = {"model": str(tmp_path), "device": "cuda"} | way
        result = run_ranks("support.group_jobs:targets", 1, cases=[case], batches=samples, estimator=recipe.estimator)
        found = result[0][0][1]
    whole = teacher_of(tmp_path, device="cpu")
    for batch, targets in zip(samples, found, strict=True):
        for here, there in zip(targets, whole.targets(batch, recipe), strict=True):
            assert_close(here, there, atol=2 * LOGPROB)
