"""What the ranks tell each other of each step, so that all do it, or all leave before it.

It takes one exchange of a few numbers, which begins while the step before is computed, and more of them while a rank
waits for its data.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from storage_schemas.common.errors import TemporaryError, exit_code
from student_train.data.batch import TrainBatch
from student_train.data.follower import Follower
from student_train.data.stream import Stream
from student_train.saving import Saver
from student_train.training_run import TrainingRun
from student_train.utilisation import peak_memory
from student_train.world import World

POLL_SECONDS = 1.0
"""How long a rank waits for its data before it tells the others that it is still there."""


class Vote(NamedTuple):
    """What each rank tells the others of a step."""

    code: float
    """Exit code of its error, 0 for none."""
    stop: float
    """Whether it is asked to stop."""
    batches: float
    """Micro-batches that it has, -1 while it waits for them."""
    supervised: float
    """Supervised tokens of these."""
    tokens: float
    """All their tokens."""
    padded: float
    """And what fills them up to the longest."""
    memory: float
    """See `utilisation.peak_memory`."""
    wait: float
    """Seconds that it waited for them."""
    allowed: float
    """On the main rank: steps whose data may be read."""
    save: float
    """On the main rank: whether a checkpoint is due after this step."""


class _Asked(NamedTuple):
    """What a rank has of a step, and has begun to tell the others."""

    batches: list[TrainBatch] | None
    """Its micro-batches; None while it waits for them."""
    wait: float
    """Seconds that it waited for them."""
    told: Callable[[], list[list[float]]]
    """Waits for what all ranks tell, a `Vote` each."""


class Agreement:
    """One rank's part in it."""

    def __init__(self, world: World, run: TrainingRun, stop: Callable[[], bool], saver: Saver) -> None:
        """Nothing is told yet. `stop` and `saver` are asked for each step."""
        self._world, self._run, self._stop, self._saver = world, run, stop, saver
        self._followers = [Follower(dump, order) for dump, order in zip(run.dumps, run.mix.orders, strict=True)]
        self._ahead: _Asked | None = None
        self.trouble: BaseException | None = None
        """An error of this rank that the others have not been told of yet."""

    def allowed(self) -> int:
        """How many steps may be read by now. Raises NeoError as `Follower.windows`."""
        return self._run.mix.steps_within([follower.windows() for follower in self._followers], self._run.steps)

    def begin(self, stream: Stream, step: int) -> None:
        """Tell the others of a step that comes next, without waiting for anything. Collective."""
        self._ahead = self._ask(stream, step, time.monotonic(), timeout=0.0)

    def reach(self, stream: Stream, step: int) -> tuple[list[TrainBatch] | None, list[Vote]]:
        """Wait until every rank has its micro-batches of a step, or one has a reason to leave. Collective.

        Returns:
            This rank's micro-batches, as many as any other's, None if the step is not done; and what all ranks tell.
        """
        began = time.monotonic()
        asked, self._ahead = self._ahead or self._ask(stream, step, began), None
        while True:
            votes = [Vote(*told) for told in asked.told()]
            stream.allow(int(votes[0].allowed))
            if any(vote.code or vote.stop for vote in votes):
                return None, votes
            if asked.batches is not None and all(vote.batches >= 0 for vote in votes):
                missing = int(max(vote.batches for vote in votes)) - len(asked.batches)
                return asked.batches + [stream.filler()] * missing, votes
            asked = self._ask(stream, step, began, asked)

    def _ask(
        self, stream: Stream, step: int, began: float, before: _Asked | None = None, *, timeout: float = POLL_SECONDS
    ) -> _Asked:
        """Look for this rank's micro-batches, unless it had them before, and begin to tell the others. Collective."""
        batches, wait = before[:2] if before else (None, 0.0)
        allowed = 0
        try:
            if self._world.main and self.trouble is None:
                self._saver.check()
                allowed = self.allowed()
                stream.allow(allowed)
                if allowed <= step:
                    self._refuse_stalled(time.monotonic() - began)
            if batches is None and self.trouble is None:
                batches = stream.get(step, timeout=timeout)
                wait = time.monotonic() - began
        except Exception as caught:
            self.trouble = caught
        mine = Vote(
            code=exit_code(self.trouble),
            stop=self._stop(),
            batches=-1 if batches is None else len(batches),
            supervised=sum(batch.supervised for batch in batches or ()),
            tokens=sum(batch.tokens for batch in batches or ()),
            padded=sum(batch.padding for batch in batches or ()),
            memory=peak_memory(self._world.device),
            wait=wait,
            allowed=allowed,
            save=self._saver.due(step + 1),
        )
        return _Asked(batches, wait, self._world.ask(mine))

    def _refuse_stalled(self, waited: float) -> None:
        if waited > self._run.train.data_wait_seconds:
            found = zip(self._run.sources, self._followers, self._run.mix.orders, strict=True)
            ready = [f"{source.name}: {follower.windows()} of {order.windows}" for source, follower, order in found]
            raise TemporaryError(
                "timed out waiting for the dump",
                got=f"{'; '.join(ready)} shuffle windows ready after {waited:.0f} s",
                expected="the next window of units to be committed",
                fix="see that stage one runs, then run the same command again; or raise train.data_wait_seconds",
            )
