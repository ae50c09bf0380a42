"""Offline distillation against the teacher itself: stored targets lose nothing but what the fidelity gate allows."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from dense import rows_of
from support.engine_jobs import leave_start, student_of, train_section
from support.rounding import FORWARD, GRADIENT
from support.tiny_student import VOCAB, save_student, teacher_logits, write_dump
from torch import Tensor

from storage_schemas.config import TopK
from storage_schemas.reader import Dump
from storage_schemas.rows import Row
from storage_schemas.shift import supervised_positions
from student_train.data.batch import collate
from student_train.model.student import Distilled

pytestmark = pytest.mark.exact

TEMPERATURES = (1.0, 2.0)
SAMPLES = range(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps with k = V and k = 8, exact and rounded; a student, and the teacher as a student."""
    folder = tmp_path_factory.mktemp("exact")
    for exact in (True, False):
        for k in (VOCAB, 8):
            write_dump(
                folder / f"dump-{k}-{exact}",
                samples=len(SAMPLES), exact=exact, estimator=TopK(k=k, mass=1.0), temperatures=TEMPERATURES,
                bad_samples=False,
            )  # fmt: skip
    save_student(folder / "student", seed=1)
    save_student(folder / "teacher", seed=0)
    return folder


def dump_of(folder: Path, k: int, *, exact: bool) -> Dump:
    """One of the dumps."""
    return Dump.open(str(folder / f"dump-{k}-{exact}"))


def module_of(folder: Path, dump: Dump, name: str, arm: str, temperature: float, alpha: float = 0.5) -> Distilled:
    """A student; an adapter has left its start."""
    loss = {"alpha": alpha, "temperature": temperature}
    module = student_of(folder / name, dump, train_section(folder, arm=arm), loss=loss)
    if arm == "neo" and name == "student":
        leave_start(module)
    return module


def offline(module: Distilled, dump: Dump, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, CE, KL) per token and gradients by name, from the stored targets."""
    rows = rows_of(dump, SAMPLES)
    index = dump.provenance.temperature_index(temperature)
    batch = collate(rows, temperature_index=index, temperature=temperature)
    loss, parts = module(batch)
    return parts[:3] / len(batch.targets), _gradients(module, loss / len(batch.targets))


def online(
    module: Distilled, rows: Sequence[Row], temperature: float, alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the teacher's dense logits."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        at = supervised_positions(row.loss_mask)
        ids = torch.from_numpy(row.input_ids.astype("int64"))
        log_p = (teacher_logits(row.input_ids)[at.logits] / temperature).log_softmax(1)
        logits = module.student(input_ids=ids[None], use_cache=False).logits[0][at.logits].double()
        ce = torch.nn.functional.cross_entropy(logits, ids[at.tokens], reduction="sum")
        kl = (log_p.exp() * (log_p - (logits / temperature).log_softmax(1))).sum()
        total = total + (1 - alpha) * ce + alpha * temperature**2 * kl
        tokens += len(at.tokens)
    return total / tokens, _gradients(module, total / tokens)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_offline_equals_online(folder: Path, temperature: float) -> None:
    """With k = V: to rounding on exact targets, for the loss and the gradient of every LoRA weight."""
    dump = dump_of(folder, VOCAB, exact=True)
    module = module_of(folder, dump, "student", "neo", temperature)
    (loss, *_), found = offline(module, dump, temperature)
    expected_loss, expected = online(module, rows_of(dump, SAMPLES), temperature, 0.5)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=FORWARD)
    assert any("lora_A" in name for name in found)
    for name, gradient in expected.items():
        assert float(gradient.abs().max()) > 1e-4
        assert float((found[name] - gradient).abs().max() / gradient.abs().max()) < GRADIENT, name


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_stored_values_stay_within_the_gate(folder: Path, temperature: float) -> None:
    """Rounded values: the loss moves by no more than the fidelity gate lets the targets move.

    Pinsker: targets whose KL is at most g differ by at most sqrt(g / 2) in total variation, and the divergence from a
    fixed student then by at most that times the spread of log q.
    """
    dump = dump_of(folder, VOCAB, exact=False)
    module = module_of(folder, dump, "student", "neo", temperature)
    rows = rows_of(dump, SAMPLES)
    (loss, *_), found = offline(module, dump, temperature)
    expected_loss, expected = online(module, rows, temperature, 0.5)
    gate = dump.provenance.max_kl
    assert max(record.fidelity[0] for record in dump.read_records().values()) <= gate
    assert abs(float(loss - expected_loss)) <= 0.5 * temperature**2 * 2 * (gate / 2) ** 0.5
    assert float(loss) != float(expected_loss), "the values must have been rounded"
    flat, reference = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    assert float((flat - reference).norm() / reference.norm()) < (gate / 2) ** 0.5


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [8, VOCAB])
@pytest.mark.parametrize("arm", ["kd", "neo"])
def test_student_equal_to_teacher_has_nothing_to_learn(folder: Path, arm: str, k: int, temperature: float) -> None:
    """KL and gradient are 0 on exact targets, also with a bucket for the tail; within the gate on stored ones."""
    for exact in (True, False):
        dump = dump_of(folder, k, exact=exact)
        module = module_of(folder, dump, "teacher", arm, temperature, alpha=1.0)
        (_, _, kl), gradients = offline(module, dump, temperature)
        size = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        if exact:
            assert abs(float(kl)) < FORWARD
            assert size < GRADIENT
        else:
            assert abs(float(kl)) <= dump.provenance.max_kl
            assert size < 0.02


def _gradients(module: Distilled, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.trained() if p.grad is not None}
