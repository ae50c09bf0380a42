"""What the student is worth on held-out samples while it trains, without the teacher, on all ranks together.

The samples are cut into the same micro-batches, and their sums are added in the same order, whatever the number of
ranks. Best step and early stopping are functions of the results so far, which every checkpoint holds.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from storage_schemas.common.errors import DataError, exit_code
from storage_schemas.reader import Dump
from storage_schemas.rows import UnitRows
from storage_schemas.shared_unit import SharedUnit
from student_train.config import Metric
from student_train.data.batch import TrainBatch, collate
from student_train.data.deal import Limit, rank_slice
from student_train.metrics import HeldoutResult
from student_train.model.head import SUMS
from student_train.underway import Underway
from student_train.world import World


class Heldout:
    """A sealed dump of held-out samples, ready to be evaluated on."""

    def __init__(self, dump: Dump, *, temperature: float, limit: Limit) -> None:
        """Nothing is read yet.

        Args:
            dump: sealed.
            temperature: of both distributions; one that the dump was made with.
            limit: of a micro-batch.

        Raises:
            MismatchError: the dump does not have this temperature.
        """
        self.dump, self.temperature = dump, temperature
        self._index = dump.provenance.temperature_index(temperature)
        self._limit = limit._replace(packed=False)

    def evaluate(
        self,
        world: World,
        sums_of: Callable[[TrainBatch], Underway],
        *,
        step: int,
        vocab_size: int | None,
        stop: Callable[[], bool],
    ) -> HeldoutResult | None:
        """Evaluate what has been trained. Collective; weights, optimizer and data of the training stay as they are.

        Args:
            sums_of: the student's sums of `HeadLoss` over a micro-batch; collective.
            vocab_size: every id must lie below it, if given: the columns of the student's head that are in use.
            stop: asked before each forward pass; once it says yes on any rank, the evaluation is given up.

        Returns:
            The result; None if it was given up.

        Raises:
            DataError: a unit is damaged, no sample has a target, or the loss is not finite.
            PeerError: another rank has met an error with its data.
        """
        began = time.monotonic()
        rounds = self._rounds(world, vocab_size)
        mine: list[tuple[int, Underway]] = []
        while True:
            batch, error = None, None
            try:
                batch = next(rounds, None)
            except Exception as caught:
                error = caught
            codes, stops = zip(*world.gather([exit_code(error), stop()]), strict=True)
            world.leave_together(codes, error)
            if any(stops):
                return None
            if batch is None:  # Of all ranks at once.
                break
            mine.append((len(batch.targets), sums_of(batch)))
        # Only now, so that a device need not wait for the host to decode the next batch.
        everyone = world.gather([value for tokens, sums in mine for value in (tokens, *sums.read())]) if mine else []
        if not all(math.isfinite(value) for values in everyone for value in values):
            raise DataError(
                f"the loss on held-out samples is not finite after step {step}",
                got="NaN or infinity",
                expected="a finite number for every micro-batch",
                fix="lower train.learning_rate or train.max_grad_norm, or use fp32",
            )
        # fsum is exact, so that it does not matter which rank has made which of them.
        sums = [math.fsum(value for values in everyone for value in values[i :: 1 + SUMS]) for i in range(1 + SUMS)]
        return self._result(step, sums, seconds=time.monotonic() - began)

    def _result(self, step: int, sums: Sequence[float], *, seconds: float) -> HeldoutResult:
        if not sums[0]:
            raise DataError(
                f"nothing can be evaluated on {self.dump.store.url}",
                got="no sample with a target",
                expected="held-out samples of status `ok`",
                fix="`llm-neo inspect` counts the dump's samples by status; correct heldout.sources, or dump again",
            )
        tokens, _, ce, kl, agreement, least, most = sums
        return HeldoutResult(
            step=step,
            kl=kl / tokens,
            ce=ce / tokens,
            top1_agreement=None if self.dump.provenance.estimator.kind == "sampled" else agreement / tokens,
            acceptance_rate_min=least / tokens,
            acceptance_rate_max=most / tokens,
            supervised_tokens=int(tokens),
            seconds=seconds,
            temperature=self.temperature,
            dump=self.dump.fingerprint,
        )

    def _rounds(self, world: World, vocab_size: int | None) -> Iterator[TrainBatch]:
        """This rank's micro-batches; every rank has as many, the last one may be a filler."""
        micro_batches = self._micro_batches()
        while together := list(islice(micro_batches, world.world_size)):
            unit, places = together[world.rank] if world.rank < len(together) else (None, [])
            rows = [unit.row(i) for i in places] if unit is not None else []
            yield collate(rows, temperature_index=self._index, temperature=self.temperature, vocab_size=vocab_size)

    def _micro_batches(self) -> Iterator[tuple[UnitRows | SharedUnit, list[int]]]:
        """Unit by unit, the places of its samples with targets, longest first."""
        for unit in range(self.dump.provenance.units):
            opened = self.dump.open_unit(unit)
            used = np.flatnonzero(opened.used_tokens)
            for share in rank_slice(used, 0, 1, self._limit, lengths=opened.used_tokens[used]):
                yield opened, share.tolist()


def best(results: Sequence[HeldoutResult], metric: Metric) -> HeldoutResult | None:
    """Of what has been trained, the earliest result with least of the metric; None before the first."""
    return min((result for result in results if result.step), key=lambda result: getattr(result, metric), default=None)


def stops_early(results: Sequence[HeldoutResult], metric: Metric, patience: int | None) -> bool:
    """Whether so many results in a row, up to the last, are no better than the best one before them."""
    found = best(results, metric)
    return found is not None and patience is not None and sum(r.step > found.step for r in results) >= patience
