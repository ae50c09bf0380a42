"""The commands that exchange: `import` and `export` with other projects' stores, `push` and `pull` with the hub."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from pipeline.cli_config import AsJson
from pipeline.cli_options import StoreOptions, Url, pairs, print_result, shown_progress
from storage_schemas.common.errors import UsageError
from storage_schemas.common.secrets import masked
from storage_schemas.config import DumpSection
from storage_schemas.stores.store import Store
from teacher_dump.config import TeacherSection


def bring(
    layout: Annotated[
        Literal["distillkit", "axolotl", "lists", "megatron"],
        typer.Argument(metavar="FORMAT", help="distillkit, axolotl, lists, megatron: `llm-neo docs interoperability`."),
    ],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The store: a file, or a directory of files.")],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The dump to write: a path, file://, s3://, gs:// or az://.")
    ],
    teacher: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The model behind the values: directory or hub id. Its config.json and tokenizer are read, no weight.",
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Commit of MODEL on the hub.")] = None,
    shift: Annotated[
        Literal["next", "same"] | None,
        typer.Option(help="Row j of a sample's targets describes token j + 1, or token j."),
    ] = None,
    values: Annotated[
        Literal["logprobs", "probs", "logits"] | None, typer.Option(help="What a stored value is.")
    ] = None,
    tail: Annotated[
        Literal["implied", "lost"] | None,
        typer.Option(
            help="implied: values are normalised over the vocabulary, the rest is what they lack of 1. lost: over the "
            "stored entries, so nothing is known of the rest.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="At which the values were computed; only 1 can be imported.")
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="all|COLUMN", help="All tokens are supervised, or those of a column: 0 and 1, or labels with -100."
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For megatron: a row of `input_ids` per sequence that the teacher has seen."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="For lists: the column that holds `ids` or `values`. Repeatable."),
    ] = None,
    samples_per_unit: Annotated[int, typer.Option(min=1, help="Samples per shard file.")] = 512,
    store: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Turn targets that another project has stored into a dump. What its files do not say is asked for, not guessed."""
    from teacher_dump.foreign.bring import bring as bring_store

    options, columns = pairs(store), pairs(column, option="--column")
    Store(url, options=options, setting="URL or --store")
    try:
        place = DumpSection(url=url, samples_per_unit=samples_per_unit, storage_options=options)
        model = TeacherSection(model=teacher, revision=revision)
    except ValidationError as error:
        told = error.errors()[0]
        raise UsageError(f"{told['loc'][0]}: {told['msg']}", got=masked(str(told["input"]))) from error
    claims = {"shift": shift, "values": values, "tail": tail, "temperature": temperature, "mask": mask}
    with shown_progress(f"importing {source}") as progress:
        found = bring_store(
            layout, source, place, teacher=model, claims=claims, columns=columns, tokens=tokens, progress=progress
        )
    print_result(found.model_dump(mode="json"), as_json)


def export(
    layout: Annotated[Literal["axolotl"], typer.Argument(metavar="FORMAT", help="axolotl: its columns for KD.")],
    url: Url,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write, NAME.parquet. Nothing is overwritten.")
    ],
    store: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Write a dump in the layout of another project, and say what of it that layout cannot hold."""
    from teacher_dump.foreign.export import export_axolotl

    with shown_progress(f"exporting {url} to {layout}") as progress:
        found = export_axolotl(url, out, options=pairs(store), progress=progress)
    print_result(found.model_dump(mode="json"), as_json)


def push(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A sealed dump, a model or an adapter: a directory on this machine."),
    ],
    url: Annotated[
        str, typer.Argument(metavar="URL", help="hf://datasets/USER/NAME for a dump, hf://USER/NAME for a model.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; one that is public is refused.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite files of another model there; never those of a dump.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a dump or a model to the Hugging Face hub, verified before and compared after. Again, it goes on."""
    from pipeline.hub import push as push_to_hub

    with shown_progress(f"verifying {source}") as progress:
        found = push_to_hub(source, url, private=private, replace=replace, progress=progress)
    print_result(found.model_dump(mode="json"), as_json)


def pull(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="hf://datasets/USER/NAME or hf://USER/NAME, with @REVISION if need be.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write to. Nothing in it is overwritten.")],
    as_json: AsJson = False,
) -> None:
    """Download a dump or a model from the Hugging Face hub, and verify it. Again, it goes on."""
    from pipeline.hub import pull as pull_from_hub

    with shown_progress(f"verifying {out}") as progress:
        found = pull_from_hub(url, out, progress=progress)
    print_result(found.model_dump(mode="json"), as_json)
