"""The command line. Heavy packages are imported by the command that needs them, so that `--help` is instant."""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand

from pipeline import cli_config, cli_exchange
from pipeline.cli_config import AsJson, ConfigPath, Overrides, load_config
from pipeline.cli_options import StoreOptions, Url, pairs, print_result, shown_progress
from pipeline.config import need
from pipeline.hints import HintingGroup
from pipeline.launch import Nodes, Placement, dump_placement, training_nodes
from pipeline.pairing import refuse_pair
from pipeline.processes import dump_group, dump_workers, run_directory, train_workers
from storage_schemas.common.devices import local_place, take_own_gpus, visible_gpus
from storage_schemas.common.dtypes import dtype_name
from storage_schemas.common.errors import NeoError, TemporaryError, UsageError, explained
from storage_schemas.common.exits import Exit
from storage_schemas.common.extras import STAGE_TWO, refuse_missing
from storage_schemas.common.publish import publish
from storage_schemas.common.secrets import shown
from storage_schemas.common.signals import interrupt
from student_train.config import sections_of
from teacher_dump.config import TeacherSection

log = logging.getLogger(__name__)
app = typer.Typer(
    name="llm-neo",
    cls=HintingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Running a command again continues it. Exit codes: 0 done, 64 usage, 65 bad data, 66 nothing to resume "
    "from, 70 bug, 75 temporary (run again), 78 configuration or fingerprint mismatch.",
)
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Workers of stage one to start on this machine; default: as many as its GPUs hold."),
]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks of stage two on this node; default: one per GPU.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed for choosing the samples.")]
GroupSize = Annotated[
    int | None, typer.Option(min=1, help="Processes that share one sharded teacher; default: one per GPU.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the code that the model brings: a directory, or one commit. Of an adapter, with --base.",
    ),
]
Base = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where an adapter's base model lies, if not where the adapter says.")
]
Result = Annotated[
    Path | None, typer.Option(hidden=True, help="Leave the result there, for the command that started this one.")
]
_WATCH_SECONDS = 10
_PAGE = b"<style>\n:root { color-scheme: light dark; --line: #8884;"
"""In every page that is written, by which a page is known that may be written anew."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Distil a large language model: dump the teacher's distribution once, train a LoRA student from the shards."""
    if version:
        typer.echo(f"llm-neo {installed_version('llm-neo')}")
        raise typer.Exit
    del context
    quiet_libraries()


def quiet_libraries() -> None:
    """Our own messages on standard error, and of the libraries' only what matters."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "datasets", "filelock", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # What it cannot read as JSON is read line by line, and told with the line, by us.
    logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)
    # Deprecations inside torch and transformers are not the user's business, nor are their bars in a log file.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():
        for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(bars, "1")


app.command()(cli_config.init)


@app.command()
def dump(
    config: ConfigPath,
    overrides: Overrides = None,
    workers: Workers = None,
    nproc: GroupSize = None,
    rank: Annotated[int | None, typer.Option(help="This worker's number; default: from the scheduler.")] = None,
    world_size: Annotated[int | None, typer.Option(help="Number of workers; default: from the scheduler.")] = None,
    events: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append progress to FILE, one JSON object per event.")
    ] = None,
    as_json: AsJson = False,
    result: Result = None,
) -> None:
    """Stage one: run the teacher once and write its targets. Also dumps `heldout`, if configured."""
    from pipeline.views.summary import dump_lines, print_parts

    # A worker that another command has started leaves a result, and repeats no notices.
    found = load_config(config, overrides or (), quiet=result is not None)
    teacher = need(found.teacher, "teacher", "dump")
    need(found.corpus, "corpus", "dump")
    if teacher.device in ("auto", "cuda") and result is None:  # Else they were dealt.
        take_own_gpus(os.environ)
    placement = dump_placement(os.environ, rank, world_size)
    _refuse_unfit_group(nproc, teacher)
    workers = _workers(workers, teacher)
    if workers > 1 and teacher.grouped:
        raise typer.BadParameter("use --nproc: all processes here hold one teacher together", param_hint="--workers")
    if result is None:
        refuse_pair(found)
    if teacher.grouped:
        code, summary = dump_group(config, overrides or (), _ranks(nproc), node=placement, events=events)
    elif workers > 1:
        code, summary = dump_workers(config, overrides or (), workers, node=placement, events=events)
    else:
        from pipeline.commands import run_dumps

        code, summary = 0, run_dumps(found, placement, events=events)
    if code:
        raise typer.Exit(code)
    print_result(summary, as_json, result, show=partial(print_parts, dump_lines))


@app.command()
def freeze(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Tokenise the corpus, and `heldout`, into the cache, where the workers of a dump find it. Loads no weights."""
    from pipeline.commands import run_freeze
    from pipeline.views.summary import frozen_lines, print_parts

    found = run_freeze(load_config(config, overrides or ()))
    print_result(found, as_json, show=partial(print_parts, frozen_lines))


@app.command()
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    row: Annotated[int | None, typer.Option(min=0, metavar="N", help="Show sample number N.")] = None,
    samples: Annotated[int, typer.Option(min=0, metavar="K", help="Show K samples, evenly spaced.")] = 1,
    heldout: Annotated[bool, typer.Option("--heldout", help="Preview the held-out samples instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the corpus becomes: formats, counts, lengths, samples with what is supervised. Loads no weights."""
    from pipeline.views.preview import show
    from teacher_dump.corpus.preview import load_tokenizer
    from teacher_dump.corpus.preview import preview as view

    settings = load_config(config, overrides or ())
    settings = settings.heldout_config("preview --heldout") if heldout else settings
    teacher, corpus = need(settings.teacher, "teacher", "preview"), need(settings.corpus, "corpus", "preview")
    tokenizer, lm_head_rows = load_tokenizer(teacher)
    found, rows = view(corpus, tokenizer, lm_head_rows=lm_head_rows, row=row, samples=samples)
    told = found.model_dump(mode="json") | {"rows": [sample.model_dump(mode="json") for sample in rows]}
    print_result(told, as_json, show=lambda _, console: show(found, rows, console))


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Ranks = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes; default: from Slurm.")] = None,
    node_rank: Annotated[int | None, typer.Option(help="Number of this node; default: from Slurm.")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where nodes meet, on node 0; default: from Slurm.")
    ] = None,
) -> None:
    """Stage two: train the student from the dump under DeepSpeed. Starts a rank per GPU; resumes by itself."""
    from pipeline.commands import report_training

    found = load_config(config, overrides or ())
    nodes = training_nodes(os.environ, nnodes, node_rank, rdzv_endpoint)
    kept = need(found.train, "train", "train").output / "config.yaml"
    refuse_missing("`llm-neo train`", *STAGE_TWO, extra="train")
    with run_directory(found, nodes):
        if nodes.node_rank == 0 and not kept.exists():
            publish(kept, found.to_yaml(), private=True)
        code = train_workers(found, nproc=_ranks(nproc), nodes=nodes)
        # Not before: a start that is refused must not replace what the results in this directory were made with.
        if nodes.node_rank == 0 and code in (Exit.DONE, Exit.TEMPORARY):
            publish(kept, found.to_yaml(), private=True)
        if nodes.node_rank == 0 and code == Exit.DONE:
            report_training(found)
            typer.echo(f"trained: {kept.parent / 'final'}")
    raise typer.Exit(code)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    workers: Workers = None,
    nproc: Ranks = None,
    as_json: AsJson = False,
) -> None:
    """Everything on one machine: dump, verify, evaluate, train, evaluate, merge, report."""
    from pipeline.run import run_pipeline

    found = load_config(config, overrides or ())
    refuse_missing("`llm-neo run`", *STAGE_TWO, extra="train")
    with run_directory(found, Nodes(), command="run"):
        # With --json, standard output belongs to the object alone.
        console = Console(stderr=as_json)
        summary = run_pipeline(
            found,
            config,
            overrides or (),
            workers=_workers(workers, found.teacher),
            nproc=_ranks(nproc),
            console=console,
        )
    if as_json:
        print_result(summary, as_json)


@app.command()
def evaluate(
    model: Annotated[
        list[str],
        typer.Option(metavar="DIR", help="A model, or a peft adapter; a second one is compared with the first."),
    ],
    dump: Annotated[str, typer.Option(metavar="URL", help="The dump to compare with, of held-out samples.")],
    store: StoreOptions = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per forward pass, padding included.")] = 4096,
    temperature: Annotated[float, typer.Option(help="Temperature of both distributions; the dump must hold it.")] = 1.0,
    device: Annotated[str, typer.Option(help="Device to evaluate on: auto, cpu, cuda, cuda:1, ...")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate no more than the first N samples.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Evaluate on what an unfinished dump already holds.")
    ] = False,
    base: Base = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a model on the hub; of the first one.")] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
    result: Result = None,
) -> None:
    """Compare a model with the teacher on a dump, token by token: KL, cross-entropy, agreement, calibration."""
    refuse_missing("`llm-neo evaluate`", "peft", extra="train")
    from pipeline.views.evaluation import print_evaluation
    from storage_schemas.reader import Dump
    from student_train.results.evaluate import Evaluated
    from student_train.results.evaluate import evaluate as evaluate_model
    from student_train.results.saved import is_adapter

    if len(model) > 2 or len(set(model)) < len(model):
        raise UsageError("one model is evaluated, or two", got=", ".join(model), expected="at most two, of other names")
    if revision is not None and Path(model[0]).is_dir() and not is_adapter(model[0]):
        raise UsageError(
            f"{model[0]} is a directory",
            got=f"--revision {revision}",
            expected="a model on the hub",
            fix="leave it out",
        )
    found: dict[str, Evaluated] = {}
    for name in model:
        with shown_progress(f"evaluating {name}") as progress:
            found[name] = evaluate_model(
                name,
                Dump.open(dump, options=pairs(store)),
                temperature=temperature,
                batch_tokens=batch_tokens,
                device=device,
                limit=limit,
                partial=partial,
                base=_base_of(name, model, base),
                revision=revision if name == model[0] else None,
                trust=trust_remote_code,
                progress=progress,
            )
    results = {name: one.result().model_dump(mode="json") for name, one in found.items()}
    differences = {}
    if len(model) == 2:
        less = found[model[1]].less(found[model[0]])
        differences = {name: difference.model_dump(mode="json") for name, difference in less.items()}
    whole = {"models": results, "differences": differences} if differences else results[model[0]]
    print_result(whole, as_json, result, show=lambda _, console: print_evaluation(results, differences, console))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs, such as runs/a.")],
    html: Annotated[
        Path | None,
        typer.Option(dir_okay=False, metavar="FILE", help="Write a page with curves and held-out samples."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Held-out samples on the page, beside the first run's student; 0: load no model.")
    ] = 3,
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Put finished runs side by side: what they were, what came out, what it cost; what seeds say of differences."""
    from pipeline.views.runs import markdown, read_run

    found = [read_run(folder) for folder in dict.fromkeys(runs)]
    if html is None:
        typer.echo(markdown(found))
        return
    if samples:
        refuse_missing("a page with samples", "peft", extra="train", instead="give --samples 0")
    from pipeline.views.run_page import run_page, samples_of
    from storage_schemas.reader import Dump
    from student_train.results.evaluate import evaluate as evaluate_model

    config, told, heldout = found[0].config, [], None
    if samples and config.heldout is not None:
        heldout = config.heldout.url
        try:
            dump = Dump.open(heldout, options=config.dump.storage_options)
            told = samples_of(
                evaluate_model(runs[0] / "final", dump, limit=samples, base=base, trust=trust_remote_code)
            )
        except NeoError as error:
            sys.stderr.write(f"the page has no samples: {shown(str(error))}\n")
    _write_page(html, run_page(found, told, heldout=heldout))
    typer.echo(f"{html}: {', '.join(run.name for run in found)}")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a peft adapter, such as runs/a/final.")],
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Another one, such as the teacher, that answers the same. Repeatable."),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the conversation.")] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this alone; default: each line of standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a reply, at most.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of sampling; 0: always the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1, ...")] = "auto",
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model: with its own chat template, to an end where it has learned to stop."""
    refuse_missing("`llm-neo chat`", "peft", extra="train")
    from pipeline.views.chat import converse
    from student_train.results.chat import Chat

    if prompt is not None and not prompt.strip():
        raise UsageError("there is nothing to answer", got=f"--prompt {prompt!r}", expected="a text")
    names = [model, *(beside or ())]
    models = [
        (name, Chat(name, base=_base_of(name, names, base), device=device, trust=trust_remote_code)) for name in names
    ]
    converse(models, system=system, once=prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command()
def merge(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory of a peft adapter, such as runs/a/final.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write the model to.")],
    dtype: Annotated[
        str | None, typer.Option(help="Data type to save the weights in; default: the base model's.")
    ] = None,
    base: Base = None,
    trust_remote_code: Trust = False,
) -> None:
    """Fold an adapter into its base model; the result loads without peft. Logits are compared before and after."""
    refuse_missing("`llm-neo merge`", "peft", extra="train")
    from student_train.results.merge import merge as merge_adapter

    saved_as = merge_adapter(
        adapter, out, dtype=None if dtype is None else str(dtype_name(dtype)), base=base, trust=trust_remote_code
    )
    serving = "`llm-neo docs serving` says how to serve it, or the adapter unmerged"
    typer.echo(f"{out} is a plain model in {saved_as}; {serving}")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    pilot_samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of samples to run the teacher on.")
    ] = 64,
    seed: Seed = 0,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(min=1e-3, metavar="X", help="Speed of the worker to plan for; default: measured here."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, metavar="P", help="Price per device-hour; adds a cost estimate.")
    ] = None,
    nproc: GroupSize = None,
    as_json: AsJson = False,
) -> None:
    """Say what a dump will hold, weigh and cost, from a pilot with the real teacher. Writes nothing."""
    from pipeline.views.plan import print_plan

    whole = load_config(config, overrides or ())
    teacher = need(whole.teacher, "teacher", "plan")
    need(whole.corpus, "corpus", "plan")
    _refuse_unfit_group(nproc, teacher)
    pilot: dict[str, Any] = {"samples": pilot_samples, "seed": seed}
    pilot |= {"tokens_per_second": tokens_per_second, "price_per_hour": price_per_hour}
    if teacher.grouped:
        code, found = dump_group(config, overrides or (), _ranks(nproc), node=Placement(0, 1), pilot=pilot)
        if code:
            raise typer.Exit(code)
    else:
        from pipeline.commands import run_plan

        found = run_plan(whole, pilot)
    print_result(found, as_json, show=print_plan)


@app.command()
def verify(
    url: Url,
    recompute: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also compute N rows again with the teacher, and compare.")
    ] = None,
    seed: Seed = 0,
    config: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Configuration of the dump: its teacher runs, its corpus is compared."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the teacher lies; default: where CONFIG or the dump say.")
    ] = None,
    store: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Verify a dump's integrity: every record, file and value. Only --recompute needs the teacher."""
    from pipeline.commands import recomputing
    from pipeline.views.summary import print_parts, verify_lines
    from storage_schemas.verify import verify as verify_dump

    if recompute is None and (config is not None or model is not None):
        raise typer.BadParameter("only --recompute needs a teacher", param_hint="--config, --model")
    compare = None
    if recompute is not None:
        made_with = None if config is None else load_config(config)
        compare = recomputing(url, pairs(store), rows=recompute, seed=seed, config=made_with, model=model)
    with shown_progress(f"verifying {url}") as progress:
        found = verify_dump(url, options=pairs(store), progress=progress).model_dump(mode="json")
    if compare is not None:
        again = compare()
        found |= {"ok": found["ok"] and not again["errors"], "errors": found["errors"] + again["errors"]}
        found["recompute"] = again
    print_result(found, as_json, show=partial(print_parts, partial(verify_lines, url)))
    if not found["ok"]:
        raise typer.Exit(Exit.BAD_DATA)


@app.command()
def inspect(
    url: Url,
    row: Annotated[
        list[int] | None, typer.Option(min=0, metavar="N", help="Show sample number N, token by token. Repeatable.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, metavar="FILE", help="Write a page that shows the same in a browser.")
    ] = None,
    store: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show what a dump holds: header from the records alone, and with --row samples, token by token."""
    from pipeline.views import inspect as show
    from pipeline.views import page, terminal
    from storage_schemas.reader import Dump

    found, rows = Dump.open(url, options=pairs(store)), list(dict.fromkeys(row or ()))
    if html is not None:
        _write_page(html, page.page(found, rows))
    if as_json:
        print_result(show.as_json(found, rows), as_json)
    elif html is not None:
        typer.echo(f"{html}: {url}, {len(rows)} rows")
    else:
        terminal.show(found, rows, Console())


def _base_of(name: str, names: Sequence[str], base: Path | None) -> Path | None:
    """`--base` for one of several models: it is meant for the adapters, and refused where there is none."""
    from student_train.results.saved import is_adapter

    return base if is_adapter(name) or not any(map(is_adapter, names)) else None


def _write_page(file: Path, text: str) -> None:
    try:
        if file.is_file() and (there := file.read_bytes()) and _PAGE not in there:
            raise UsageError(
                f"{file} is there already, and is no page of llm-neo",
                got=f"{len(there)} bytes of something else",
                expected="the name of a new file, or a page that --html has written",
                fix="choose another file",
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        publish(file, text)
    except OSError as error:
        if isinstance(told := explained(error), TemporaryError):  # The disk is full.
            raise told from error
        raise UsageError(f"cannot write {file}", got=error.strerror, expected="a place to write to") from error


class _Watching(TyperCommand):
    """`--watch` may stand without its seconds."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give it some where the next word is no number."""
        for place, word in enumerate(args):
            if word == "--watch" and not re.fullmatch(r"\d+(\.\d+)?", (args[place + 1 :] or [""])[0]):
                args[place] = f"--watch={_WATCH_SECONDS}"
        return super().parse_args(ctx, args)


@app.command(cls=_Watching)
def status(
    place: Annotated[str, typer.Argument(metavar="URL|CONFIG", help="The dump, or the configuration that names it.")],
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="Directory of a run, such as runs/a; default: the one of CONFIG."),
    ] = None,
    overrides: Overrides = None,
    store: StoreOptions = None,
    watch: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            metavar="[SECONDS]",
            help="Look again until the dump is sealed and a run that has begun is done; default: every 10 s.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a dump is, by all workers, and a run: done, speed, time left. Reads little and writes nothing."""
    from pipeline.status import Watcher
    from pipeline.views import status as views

    options, heldout, checkpoints, given, others = pairs(store), None, None, run is not None, []
    if Path(place).is_file() or place.endswith((".yaml", ".yml")):
        if store:
            raise typer.BadParameter("the configuration says it: dump.storage_options", param_hint="--store")
        config = load_config(place, overrides or ())
        place, options = config.dump.url, config.dump.storage_options
        heldout = config.heldout.url if config.heldout else None
        others = [one for one in sections_of(config.dump, config.train) if one.url.rstrip("/") != place.rstrip("/")]
        if config.train and run in (None, config.train.output):
            run, checkpoints = config.train.output, config.train.checkpoint_url
    elif overrides:
        raise typer.BadParameter("there is no configuration to override", param_hint="--set")
    watcher = Watcher(
        place, options=options, others=others, heldout=heldout, run=run, checkpoints=checkpoints, must_run=given
    )
    if watch is None:
        found = watcher.look()
        print_result(found.model_dump(mode="json"), as_json, show=lambda _, console: console.print(views.tables(found)))
    else:
        views.watch(watcher.look, Console(), seconds=watch, as_json=as_json)


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML configuration; default: look at the machine alone.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, devices, launcher, disks, stores, teacher, student and tokenizer, before anything is paid for."""
    from pipeline.doctor import examine, exit_code

    if config is None and overrides:
        raise typer.BadParameter("there is no configuration to override", param_hint="--set")
    findings, console = [], Console(quiet=as_json)
    with console.status("checking; a store that does not answer is asked for two minutes"):
        for finding in examine(config, overrides or (), os.environ):
            findings.append(finding)
            console.print(finding.line(), soft_wrap=True)
    code = exit_code(findings)
    if as_json:
        print_result({"ok": not code, "findings": [finding.model_dump(mode="json") for finding in findings]}, as_json)
    raise typer.Exit(code)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Llama-like model: directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write the smaller model to.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Keep N layers: the first and the last ones.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="0-9,20-29", help="Keep the layers with these numbers.")] = None,
) -> None:
    """Make a student by leaving out layers of a model. Says which ones stay."""
    from pipeline.prune import prune as prune_model

    typer.echo(f"{out}: {prune_model(model, out, layers=layers, keep=keep)}")


@app.command()
def resize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The student: directory or hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write the larger model to.")],
    dump: Annotated[str, typer.Option(metavar="URL", help="The dump whose tokens it shall have rows for.")],
    store: StoreOptions = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of MODEL on the hub.")] = None,
) -> None:
    """Give a student rows for tokens that only the teacher's tokenizer has. Train them with modules_to_save."""
    refuse_missing("`llm-neo resize`", "peft", extra="train")
    from storage_schemas.reader import Dump
    from student_train.results.resize import resize as resize_model

    before, after = resize_model(model, out, Dump.open(dump, options=pairs(store)), revision=revision)
    typer.echo(f"{out}: {after} rows in place of {before}; train them with student.lora.modules_to_save")


@app.command()
def docs(
    page: Annotated[str | None, typer.Argument(metavar="PAGE", help="Which one; default: list them.")] = None,
) -> None:
    """Print a page of the documentation, such as `data_formats`. Without a page: list them."""
    from rich.markdown import Markdown

    from pipeline import pages

    if page is None:
        for name, title in pages.pages().items():
            typer.echo(f"{name:24} {title}")
        return
    text, console = pages.page(page), Console()
    if console.is_terminal:
        console.print(Markdown(text, hyperlinks=False))
    else:
        typer.echo(text, nl=False)


app.command("import")(cli_exchange.bring)
app.command("export")(cli_exchange.export)
app.command("push")(cli_exchange.push)
app.command("pull")(cli_exchange.pull)
app.add_typer(cli_config.app, name="config")


def _workers(asked: int | None, teacher: TeacherSection | None) -> int:
    """Of stage one: by default as many as the visible GPUs can hold teachers."""
    if asked is not None or teacher is None or teacher.gpus is None:
        return asked or 1
    fit = len(visible_gpus(os.environ)) // teacher.gpus
    place = local_place(os.environ)
    if fit > 1 and place is not None and place[1] is None:
        # Others of this machine may be about to take these GPUs.
        log.warning("one worker, for %d GPUs may be those of other tasks here; if they are not: --workers %d", fit, fit)
        return 1
    return max(1, fit)


def _ranks(nproc: int | None) -> int:
    return nproc or len(visible_gpus(os.environ)) or 1


def _refuse_unfit_group(nproc: int | None, teacher: TeacherSection) -> None:
    if nproc is not None and not teacher.grouped:
        raise typer.BadParameter(
            "is for teacher.sharding: tensor or zero3; did you mean --workers?", param_hint="--nproc"
        )
    if teacher.sharding == "zero3":
        refuse_missing("teacher.sharding: zero3", "deepspeed", extra="train", instead="set teacher.sharding: tensor")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: errors become messages and exit codes."""
    words = sys.argv[1:] if arguments is None else arguments
    goes_on = words[:1] in (["freeze"], ["dump"], ["train"], ["run"])
    stopped = "interrupted; run the same command again to continue" if goes_on else "stopped"
    try:
        interrupt()
        app(arguments)
        code: int = Exit.DONE
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else Exit.DONE
        # What Typer says when nobody reads on (1), the command line is wrong (2), and after an interruption (130).
        code = _complain(TemporaryError(stopped)) if code == 130 else {1: Exit.TEMPORARY, 2: Exit.USAGE}.get(code, code)
    except KeyboardInterrupt:
        code = _complain(TemporaryError(stopped))
    except BaseException as error:  # Rust's panics are no Exceptions.
        told = explained(error)
        if told is None:
            sys.stderr.write(shown(traceback.format_exc()))
            told = NeoError("this is a bug in llm-neo; please report it with the lines above")
        code = _complain(told)
    sys.exit(int(code))


def _complain(error: NeoError) -> int:
    sys.stderr.write(f"llm-neo: {shown(str(error))}\n")
    return int(error.exit_code)


if __name__ == "__main__":
    main()
