"""Stage two: a student is trained on the targets of a dump."""

import gc
import hashlib
import logging
import resource
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from storage_schemas.common import faults
from storage_schemas.common.errors import DataError, NeoError, TemporaryError
from storage_schemas.common.exits import Exit
from storage_schemas.rows import Row
from student_train.agreement import Agreement, Vote
from student_train.checkpoint import EXP_AVG, EXP_AVG_SQ, INITIAL, MASTER, Checkpoint, TrainState
from student_train.config import Resolved, sections_of
from student_train.data.batch import TrainBatch, collate_mixed
from student_train.data.stream import Stream
from student_train.deterministic import set_deterministic
from student_train.engine import Engine, load_weights
from student_train.heldout import best
from student_train.metrics import EVENTS, Meter, Step, Write, read_events, reporting
from student_train.model.adapter import ALONE, Part, initial_factors, left_out, spread
from student_train.model.student import Student, causal_of, load_student, refuse_other_dump
from student_train.model.student_files import identity, sha256
from student_train.model.tokenizers import NEW_TOKENS
from student_train.profiling import recorded
from student_train.results.end_of_turn import span_ends
from student_train.results.final import write_final
from student_train.results.model_card import Evaluation, model_card
from student_train.results.saved import ADAPTER_WEIGHTS, begin_from
from student_train.resume import consumed_root, decide, finished, identity_of, over, refuse_other_run
from student_train.saving import Saver
from student_train.schedule import learning_rate
from student_train.summary import FINAL, Summary, write_summary
from student_train.training_run import (
    TrainingRun,
    await_dump,
    nothing_usable,
    open_run,
    refuse_early,
    refuse_unfit_adapter,
    stored_rows,
    trained_on,
    weigh,
)
from student_train.utilisation import Work
from student_train.warm_start import begin, refuse_other_start, refuse_other_student
from student_train.world import PeerError, World

log = logging.getLogger(__name__)

WHOLE = "dump, which train.shuffle: epoch needs, while `windows` follows one that is being written,"
PROBE_TOKENS = 64
"""Tokens of the row that the saved student is compared on, at most."""


def train(world: World, config: Resolved, *, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Train a student. Collective.

    Args:
        world: all ranks, see `engine.join`.
        stop: asked before each step, on any rank, while the step before it runs; once it says yes, all ranks write a
            checkpoint and leave.

    Returns:
        The summary of the finished run, also if it was finished before.

    Raises:
        DataError: a shard or a checkpoint is damaged, or the loss is not finite.
        MismatchError: the configuration does not fit the dump, the student or the checkpoint.
        NothingToResumeError: a checkpoint is needed and there is none.
        TemporaryError: stopped, or the dump is not written far enough; the same call goes on.
        PeerError: another rank raised one of these.
    """
    student, settings = config.student, config.train
    set_deterministic(settings.deterministic)
    early = partial(refuse_early, student, settings)
    wait = partial(await_dump, world, seconds=settings.data_wait_seconds, stop=stop, early=early)
    for section in sections_of(config.dump, settings):
        wait(section, complete=WHOLE if settings.shuffle == "epoch" else None)
    if config.heldout is not None and settings.eval_steps:
        wait(config.heldout, complete="held-out dump")
    world.on_main(partial(refuse_unfit_adapter, student, settings))
    opened = world.together(lambda: open_run(config))
    if world.world_size > 1:
        opened.share()
    world.on_main(lambda: weigh(opened, ranks=world.world_size))
    run, checkpoint, done = decide(world, opened)
    if checkpoint is not None:
        world.on_main(partial(refuse_other_start, settings, checkpoint.state.began))
    if done is not None:
        return done
    run, trained = begin(world, run, checkpoint)
    part = Part(world.rank, world.world_size, world.device)
    learner = world.together(lambda: _student(run, checkpoint, trained, main=world.main, part=part))
    if learner.initial and world.world_size > 1 and (trained or checkpoint) is None:
        spread(learner.module.student, world.world_size, world.spread)
        learner = replace(learner, initial=initial_factors(learner.module.student, student.lora))
    if trained is not None:
        world.together(partial(load_weights, learner.module, trained.tensors((MASTER,))))
    engine = Engine(learner.module, settings, world)
    try:
        if trained is not None and (updates := trained.state.updates):
            kinds = trained.tensors((MASTER, EXP_AVG, EXP_AVG_SQ))
            world.together(lambda: engine.restore(kinds, updates=updates))
        return _Loop(world, run, learner, engine, start=checkpoint.state if checkpoint else None, stop=stop).run()
    finally:
        engine.close()


def _student(
    run: TrainingRun, checkpoint: Checkpoint | None, trained: Checkpoint | None = None, *, main: bool,
    part: Part = ALONE,
) -> Student:  # fmt: skip
    """The student, refused if it does not fit the checkpoint of this run, or the one that its weights come from; on the
    main rank with all that identifies it, and proven to fit the dump."""
    model, revision = run.student.model, run.student.revision
    begun = trained or checkpoint
    initial = None if begun is None else begun.by_name(INITIAL)
    losses = [source.loss for source in run.sources]
    learner = load_student(run.student, losses, run.train, run.dump.provenance, initial=initial, part=part)
    start = run.student.adapter
    if start is not None and (checkpoint is None or not checkpoint.step):
        begin_from(learner.module.student, start)
    if not main:
        return learner
    learner = replace(learner, files=identity(model, revision, code=run.student.trust_remote_code))
    if start is not None:
        learner = replace(learner, start=sha256(start / ADAPTER_WEIGHTS))
    if trained is not None and trained is not checkpoint:
        refuse_other_student(trained, learner.files, model)
    if run.train.lora and (left := left_out(causal_of(learner.module.student), run.student.lora)):
        log.info("student.lora.target_modules: all-linear leaves out the routers: %s", ", ".join(left))
    if checkpoint is not None:
        stored, now = checkpoint.state.identity, learner.identified()
        refuse_other_run({key: stored.get(key) for key in now}, now)
    new: dict[str, None] = {}
    for dump in run.dumps:
        new |= dict.fromkeys(refuse_other_dump(learner.module.student, model, revision, dump))
    causal = causal_of(learner.module.student)
    ends = causal.get_input_embeddings(), causal.get_output_embeddings()
    if new and not all(module.weight.requires_grad for module in ends):
        log.warning(NEW_TOKENS, len(new), ", ".join(list(new)[:3]))
    return learner


class _Loop:
    """The steps of a run."""

    def __init__(
        self,
        world: World,
        run: TrainingRun,
        learner: Student,
        engine: Engine,
        *,
        start: TrainState | None,
        stop: Callable[[], bool],
    ) -> None:
        self._world, self._run, self._learner, self._engine, self._stop = world, run, learner, engine, stop
        self._resumed: int | None
        self._resumed, self._start = (start.step, start.step) if start else (None, 0)
        self._results = list(start.heldout) if start else []
        self._told, self._supervised = (start.told, start.supervised_tokens) if start else (None, 0)
        self._done = self._saved = self._start
        self._given_up = False
        """Whether the evaluation that is due was not done: a stop was asked for, or a rank has met an error."""
        names = [source.name for source in run.mixed]
        self._meter = Meter(
            start=self._start, stop=run.steps, steps_per_epoch=run.mix.steps_per_epoch, dumps=names,
            work=Work.of(causal_of(learner.module.student), world.device), ranks=world.world_size,
        )  # fmt: skip
        self._saver = Saver(world, run.checkpoints, run.train, waited=self._meter.wait)
        self._agreement = Agreement(world, run, stop, self._saver)
        self._write: Write | None = None
        """Where the rank that reports writes its events."""

    def run(self) -> Summary:
        """All steps that are left, and the end."""
        world, run = self._world, self._run
        if self._resumed is None:
            self._save()
        with ExitStack() as stack:
            stack.enter_context(self._saver)
            self._write = world.on_main(lambda: stack.enter_context(self._reporting()))
            stream = stack.enter_context(closing(self._open_stream()))
            stepped = stack.enter_context(recorded(run.train.output, run.train.profile, rank=world.rank))
            # Of what lives by now nothing dies before the end: no collection needs to walk over libraries and model.
            gc.collect()
            gc.freeze()
            stack.callback(gc.unfreeze)
            self._evaluate()
            while self._given_up or not over(run, self._done, self._results):
                batches, votes = self._agreement.reach(stream, self._done)
                if batches is None:
                    self._leave(votes)
                self._train(batches, votes, stream)
                stepped()
                self._done += 1
                evaluated = self._evaluate()
                save = votes[0].save > 0 or over(run, self._done, self._results)
                if evaluated and run.train.load_best_model_at_end:
                    save |= run.exported(self._done, self._results) == self._done
                if save or self._done % run.train.logging_steps == 0:
                    self._report()
                if save:
                    self._save()
        return self._finish()

    def _train(self, batches: Sequence[TrainBatch], votes: Sequence[Vote], stream: Stream) -> None:
        train, step = self._run.train, self._done
        supervised = int(sum(vote.supervised for vote in votes))
        rate = learning_rate(train, step, total_steps=self._run.steps)
        # Unless there is more to do before the next step, it is agreed on while this one runs.
        ahead = partial(self._agreement.begin, stream, step + 1)
        busy = step + 1 == self._run.steps or votes[0].save > 0 or self._evaluates(step + 1)
        # Dropout must not depend on what was drawn before the last start.
        torch.manual_seed(_number(f"{train.seed}/{step}/{self._world.rank}"))
        faults.point("train:step")
        try:
            result = self._engine.step(
                batches, tokens=supervised, learning_rate=rate, meanwhile=(lambda: None) if busy else ahead
            )
        except NeoError as error:
            self._saver.settle()
            self._world.raise_on_all(error)
        self._supervised += supervised
        self._meter.add(
            Step(
                loss=result.loss,
                parts=result.parts,
                router_aux=result.router_aux,
                supervised=supervised,
                tokens=int(sum(vote.tokens for vote in votes)),
                padded=int(sum(vote.padded for vote in votes)),
                memory=int(max(vote.memory for vote in votes)),
                wait=max(vote.wait for vote in votes),
                learning_rate=rate,
                grad_norm=result.grad_norm,
            )
        )

    def _evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps."""
        run, every = self._run, self._run.train.eval_steps
        return run.heldout is not None and every is not None and (step % every == 0 or step == run.steps)

    def _evaluate(self) -> bool:
        """Evaluate on the held-out samples, if it is due; whether it was done. Collective.

        What all ranks have found, such as a damaged unit, makes them leave before the next step, with what was trained.
        What one rank has met alone in a forward pass ends it as in a step of training.
        """
        run, step, heldout = self._run, self._done, self._run.heldout
        if heldout is None or not self._evaluates(step):
            return False
        if any(result.step == step for result in run.comparable(self._results)):
            return False  # By the start before this one.
        self._report()
        self._given_up = True
        try:
            result = heldout.evaluate(
                self._world,
                partial(self._engine.evaluate, temperature=heldout.temperature),
                step=step,
                vocab_size=self._learner.module.head.spec.valid_vocab,
                stop=self._stop,
            )
            if result is None:
                return False
            self._given_up = False
            self._results.append(result)
            self._meter.pause(result.seconds)
            if self._write is not None:
                self._write(result)
        except PeerError as error:
            if error.exit_code == Exit.BUG:
                raise
        except NeoError as caught:
            self._agreement.trouble = caught
        return not self._given_up

    def _leave(self, votes: Sequence[Vote]) -> NoReturn:
        """Save what was trained, and raise. Collective."""
        codes, error, step = [vote.code for vote in votes], self._agreement.trouble, self._done
        if step > self._saved and Exit.BUG not in codes:
            self._report()
            self._saver.give_up()
            self._save()
        self._saver.settle()
        self._world.leave_together(codes, error)
        self._world.raise_on_all(
            TemporaryError(
                f"training was asked to stop, and has stopped after step {step} of {self._run.steps}",
                got="SIGTERM, SIGINT or a file named `exit/stop`",
                expected="to run to the end",
                fix="run the same command again; it goes on from the checkpoint",
            )
        )

    def _save(self) -> None:
        """Begin a checkpoint. Collective. At step 0 there is nothing in it but the start of a decomposed adapter."""
        run, learner, done = self._run, self._learner, self._done

        def state() -> TrainState:
            return TrainState(
                step=done,
                updates=self._engine.updates,
                consumed=consumed_root(run.dumps, run.mix, done),
                identity=identity_of(run) | learner.identified(),
                began=run.began,
                extended=run.extended,
                heldout=tuple(self._results),
                supervised_tokens=self._supervised,
                told=self._told,
            )

        exported, best_step = self._engine.export() if done else iter(()), run.exported(done, self._results)
        size = self._engine.export_bytes if done else 0
        self._saver.save(state, exported, learner.initial, size=size, best=best_step)
        self._saved = done

    def _report(self) -> None:
        """Log the steps since the last event, if any. An error is told to the others before the next step."""
        if self._write is None or self._meter.empty:
            return
        try:
            self._told = self._meter.event(self._done)
            self._write(self._told)
        except Exception as caught:
            self._agreement.trouble = caught

    def _reporting(self) -> AbstractContextManager[Write]:
        run = self._run
        return reporting(
            run.train.output,
            run.train.report_to,
            start=self._start,
            stop=run.steps,
            config=identity_of(run),
            monitors=self._engine.monitors,
            name=f"neo-{_number(str(run.train.output.resolve())):016x}",
            divergence=run.loss.divergence,
            evaluated={result.step for result in self._results},
            labels={"name": run.train.run_name, "project": run.train.project, "tags": run.train.tags},
        )

    def _open_stream(self) -> Stream:
        run, world = self._run, self._world
        distils, temperature = run.train.distils, run.loss.temperature
        indices = [dump.provenance.temperature_index(temperature) if distils else 0 for dump in run.dumps]
        valid_vocab = self._learner.module.head.spec.valid_vocab

        def make(rows: Sequence[Sequence[Row]]) -> TrainBatch:
            batch = collate_mixed(
                rows,
                temperature_indices=indices,
                temperature=temperature,
                entries=distils,
                vocab_size=valid_vocab,
                packed=run.train.packing,
            )
            return batch.pin_memory() if world.device.type == "cuda" else batch

        return Stream(
            run.dumps,
            run.mix,
            make,
            rank=world.rank,
            world_size=world.world_size,
            limit=run.train.micro_batch,
            start=self._start,
            stop=run.steps,
            allowed=int(world.told(self._agreement.allowed)),
            dealt=run.train.shuffle == "epoch",
        )

    def _finish(self) -> Summary:
        """Write `final/`, prove it, and write the summary, which is what says that the run is done. Collective."""
        world, run = self._world, self._run
        self._saver.settle()
        # Checkpoints of before do not know how many tokens were trained on.
        if not self._supervised and (run.train.warm_start is not None or not self._engine.updates):
            world.raise_on_all(nothing_usable(run))
        peak = max(rss for (rss,) in world.gather([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
        stray = self._engine.stray()

        def write() -> None:
            if self._agreement.trouble is not None:
                raise self._agreement.trouble
            assert not stray, f"working copies are not their masters: {stray}"
            if world.main:
                self._leave_behind(int(peak))

        world.together(write)
        done = world.together(lambda: finished(run, run.checkpoints.at(self._done).state))
        assert done is not None
        return done

    def _leave_behind(self, peak_rss_bytes: int) -> None:
        """`final/`, and then summary.json, on the main rank."""
        run, seconds = self._run, self._meter.seconds
        final, events = run.train.output / FINAL, read_events(run.train.output / EVENTS)
        if not events and self._told is not None:  # The checkpoints are elsewhere, and this directory is new.
            events = [self._told]
        if not events:
            raise DataError(f"{run.train.output / EVENTS} is gone", fix="restore it, then run the same command again")
        found = identity(run.student.model, run.student.revision, code=run.student.trust_remote_code)
        if found != self._learner.files:
            raise DataError(
                f"the student {run.student.model} has changed since it was loaded",
                got=found,
                expected=self._learner.files,
                fix="restore its files, then run the same command again; the checkpoint is intact",
            )
        rows, comparable = stored_rows(run), run.comparable(self._results)
        results = {result.step: result for result in comparable}
        exported = run.exported(self._done, comparable)
        evaluation = None
        if run.heldout is not None and {0, exported} <= results.keys():
            evaluation = Evaluation.of(run.heldout.dump.store.url, results[0], results[exported])
        record = write_final(
            final,
            self._learner,
            run.student,
            run.train,
            weights=run.left_behind(self._done, self._results).by_name(MASTER),
            tokenizer=run.dump.read_tokenizer(),
            card=model_card(run.dumps, run.student, run.loss, run.train, events, folder=final, evaluation=evaluation),
            input_ids=torch.from_numpy(rows[0].input_ids[:PROBE_TOKENS].astype("int64"))[None],
            ends=span_ends(rows),
        )
        best_result = best(comparable, run.train.metric_for_best_model)
        # Steps whose samples all lack targets have no loss.
        last = next((event for event in reversed(events) if event.supervised_tokens), events[-1])
        summary = Summary(
            arm=run.train.arm,
            steps=self._done,
            planned_steps=run.steps,
            epochs=self._done / run.mix.steps_per_epoch,
            loss=last.loss,
            ce=last.ce,
            kl=last.kl,
            supervised_tokens=max(self._supervised, sum(event.supervised_tokens for event in events)),
            tokens_per_second=self._meter.total_tokens / max(1e-9, seconds),
            seconds=seconds,
            data_wait_seconds=self._meter.total_wait,
            save_wait_seconds=self._meter.total_save_wait,
            peak_rss_bytes=peak_rss_bytes,
            world_size=self._world.world_size,
            zero_stage=run.train.zero_stage,
            resumed_from=self._resumed,
            fingerprint=run.dump.fingerprint,
            dumps=trained_on(run, self._done, last),
            student=run.student.model,
            began_from_adapter=str(run.student.adapter) if run.student.adapter else None,
            began_from_checkpoint=run.began,
            final=str(final),
            final_record=record,
            extended=run.extended,
            heldout=tuple(comparable),
            best_step=best_result.step if best_result else None,
            final_step=exported,
            heldout_seconds=self._meter.paused,
        )
        write_summary(run.train.output, summary.model_dump(mode="json"))


def _number(text: str) -> int:
    """64 bits that a text decides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
