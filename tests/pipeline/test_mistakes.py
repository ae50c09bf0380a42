"""What users do wrong: each mistake has an exit code and a message that says what, got, expected and what to do.

Interruptions, full disks, killed ranks and two trainings in one directory need processes of their own: see
`test_cli.py`, `test_processes.py`, `test_run.py`, `teacher_dump/test_workers.py` and
`student_train/test_run_directory.py`.
"""

import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forks import TESTS, ForkServer

from pipeline.launch import set_arguments
from storage_schemas.common.exits import Exit

MISTAKES: list[tuple[str, int, list[str]]] = [
    # The command line.
    ("distill x.yaml", 64, ["No such command 'distill'; that is `llm-neo run`, or `llm-neo dump` and then"]),
    ("validate x.yaml", 64, ["No such command 'validate'; that is `llm-neo config show` or `llm-neo doctor`"]),
    ("config validate x.yaml", 64, ["No such command 'validate'; that is `llm-neo config show` or `llm-neo doctor`"]),
    ("show x.yaml", 64, ["that is `llm-neo config show`"]),
    ("schema", 64, ["that is `llm-neo config schema`"]),
    ("trian x.yaml", 64, ["Did you mean 'train'?"]),
    ("config shw", 64, ["Did you mean 'show'?"]),
    ("train", 64, ["Missing argument 'CONFIG'"]),
    ("train x.yaml --estimator.k 5", 64, ["settings are given as --set estimator.k=VALUE"]),
    ("train x.yaml --k=32", 64, ["settings are given as --set estimator.k=VALUE"]),
    ("train x.yaml --learning-rate 1e-3", 64, ["settings are given as --set train.learning_rate=VALUE"]),
    ("train x.yaml --num_train_epochs 3", 64, ["did you mean train.epochs? Settings are given as --set A.B=VALUE"]),
    ("train x.yaml train.epochs=2", 64, ["(train.epochs=VALUE); settings are given as --set train.epochs=VALUE"]),
    ("train x.yaml --run-name canary", 64, ["settings are given as --set train.run_name=VALUE"]),
    ("train x.yaml train.run_name=canary", 64, ["settings are given as --set train.run_name=VALUE"]),
    ("dump x.yaml dump.storage_options.secret_access_key=canary", 64,
     ["secret_access_key=VALUE); set the environment variable AWS_SECRET_ACCESS_KEY"]),
    ("dump x.yaml --dump.storage_options.session_token canary", 64, ["the environment variable AWS_SESSION_TOKEN"]),
    ("train x.yaml --set train.epochs 2", 64, ["write --set train.epochs=VALUE"]),
    ("train x.yaml --set train.deepspeed={a: {b: 1}}", 64, ["quote a value with blanks in it"]),
    ("train x.yaml --set corpus.sources=[{path:x}]", 64, ["a colon needs a blank after it"]),
    ("train x.yaml --set train.epochs", 64, ["got:      --set train.epochs...", "VALUE is YAML"]),
    ("evaluate --model student --dmp h", 64, ["--dump"]),
    ("dump x.yaml --rank 1", 64, ["--rank needs --world-size"]),
    ("dump x.yaml --rank 3 --world-size 2", 64, ["impossible worker number", "rank 3 of 2"]),
    ("dump x.yaml --nproc 2", 64, ["did you mean --workers?"]),
    ("train x.yaml --nnodes 2", 64, ["--nnodes needs --node-rank", "--node-rank N"]),
    ("train x.yaml --nnodes 2 --node-rank 0", 64, ["without a rendezvous endpoint", "--rdzv-endpoint HOST:PORT"]),
    ("verify d --model teacher", 64, ["only --recompute needs a teacher"]),
    ("inspect d --row 99", 64, ["no such row", "0 to 11"]),
    ("inspect d --html x.yaml", 64, ["x.yaml is there already, and is no page of llm-neo", "choose another file"]),
    ("preview x.yaml --row 99", 64, ["no such row", "0 to 11"]),
    ("merge run/final m --dtype int8", 64, ["no such dtype", "bfloat16, float16, float32"]),
    ("merge run/final teacher", 64, ["teacher is not empty", "choose another output"]),
    ("prune student s --layers 9", 64, ["impossible number of layers", "1 to 2"]),
    ("prune student s --keep 0-1000000000", 64, ["cannot be understood", "from 0 to 1, such as 0"]),
    ("prune student s --keep 0-100000000", 64, ["does not have", "from 0 to 1, such as 0"]),
    ("prune torn s --layers 2", 65, ["torn/model.safetensors is torn", "fetch or copy the file again"]),
    ("chat student --prompt ''", 64, ["there is nothing to answer", "got:      --prompt ''", "a text"]),
    ("doctor --set train.epochs=2", 64, ["there is no configuration to override"]),
    ("init qwen", 64, ["no such recipe", "did you mean qwen3?"]),
    ("init qwen3 --out x.yaml", 64, ["x.yaml is there already", "--out FILE"]),
    # The file.
    ("train absent.yaml", 64, ["cannot read the configuration absent.yaml", "No such file", "llm-neo init"]),
    ("train d", 64, ["cannot read the configuration d", "Is a directory", "llm-neo init"]),
    ("train tab.yaml", 78, ["line 2, column 1", "indent with blanks, not tabs"]),
    ("train twice.yaml", 78, ["line 2, column 1: duplicate key 'dump'"]),
    ("train colon.yaml", 78, ["line 3, column 11", "quote a value that holds a colon"]),
    ("train indent.yaml", 78, ["line 3, column 2", "must be indented alike"]),
    ("train bracket.yaml", 78, ["a bracket is not closed"]),
    ("train list.yaml", 78, ["got:      list", "a mapping of sections"]),
    ("train empty.yaml", 78, ["an empty file", "llm-neo init"]),
    ("train a.jsonl", 78, ["is this a configuration?"]),
    ("train link.yaml", 78, ["got:      the name of another file", "give that file: ", "x.yaml"]),
    ("train x.yaml --set techer.model=t", 78, ["--set: techer -> unknown key; did you mean teacher?"]),
    ("train x.yaml --set corpus.path=a.jsonl", 78,
     ["--set: corpus.path -> unknown key; did you mean corpus.sources[].path?"]),
    ("train x.yaml --set corpus.split=train", 78, ["did you mean corpus.sources[].split?"]),
    ("train x.yaml --set corpus.name=a", 78, ["did you mean corpus.sources[].name?"]),
    ("train x.yaml --set corpus.format=text", 78, ["did you mean corpus.sources[].format?"]),
    ("train x.yaml --set heldout.split=test", 78, ["did you mean heldout.sources[].split?"]),
    ("train x.yaml --set dump.path=d", 78, ["did you mean dump.url?"]),
    ("train x.yaml --set teacher.path=t", 78, ["did you mean teacher.model?"]),
    ("train x.yaml --set path=t", 78, ["did you mean corpus.sources[].path or heldout.sources[].path?"]),
    ("train x.yaml --set loss.kd_ce_alpha=0.1", 78, ["unknown key; the weight of the cross-entropy is 1 - loss.alpha"]),
    ("train x.yaml --set loss.kd_alpha=0.9", 78,
     ["loss.alpha? It is the weight of the divergence; the cross-entropy gets 1"]),
    ("train x.yaml --set train.batch_size=8", 78,
     ["train.global_batch_size or train.micro_batch_size? The first counts samples per optimizer step over all ranks"]),
    ("train x.yaml --set train.deepspeed.x=1 --set train.train_batch_size=8", 78,
     ["did you mean train.global_batch_size or train.micro_batch_size?"]),
    ("dump x.yaml --set teacher.batch_size=8", 78, ["did you mean teacher.batch_tokens?"]),
    ("train x.yaml --set 'train={output: r, method: lora_kd, arm: neo}'", 78,
     ["has 1 problem", "train.arm -> old name of train.method; give one"]),
    ("train x.yaml --set loss.divergence=kl", 78, ["'akl' or 'tvd', got 'kl'; did you mean forward_kl?"]),
    ("train x.yaml --set loss.divergence=RKL", 78, ["did you mean reverse_kl?"]),
    ("train x.yaml --set estimater.k=5", 78, ["--set: estimater -> unknown key; did you mean estimator?"]),
    ("train x.yaml --set corpus.sources=a.jsonl", 78, ["must be a list, got 'a.jsonl'; write [{path: 'a.jsonl'}]"]),
    ("train x.yaml --set corpus=a.jsonl", 78, ["got 'a.jsonl'; write {sources: [{path: 'a.jsonl'}]}"]),
    ("train x.yaml --set student=Llama", 78, ["must be a section", "write {model: 'Llama'}"]),
    ("train x.yaml --set temperatures=2", 78, ["must be a list, got 2; write [2]"]),
    ("train x.yaml --set train.report_to=wandb", 78, ["must be a list, got 'wandb'; write ['wandb']"]),
    ("train x.yaml --set corpus.sources.1.path=b", 78, ["the list has 1", "write the whole list"]),
    ("train x.yaml --set train.output=", 78, ["--set: train.output -> must be a path, got null"]),
    ("train x.yaml --set train.epochs=two", 78, ["must be a valid integer", "got 'two'"]),
    ("train x.yaml --set train.precision=fp16", 78, ["must be 'bf16' or 'fp32', got 'fp16'"]),
    ("train x.yaml --set student.lora.variant=qlora", 78, ["'rslora', 'dora'", "did you mean lora?"]),
    ("train x.yaml --set train.load_best_model_at_end=true",
     78, ["--set: train -> load_best_model_at_end", "set eval_steps"]),
    ("train x.yaml --set train.eval_steps=1 --set heldout=null", 78, ["train.eval_steps -> needs held-out samples"]),
    ("train x.yaml --set train.deepspeed=torn.json", 78, ["none of zero1", "cannot be read as a JSON file"]),
    ("dump x.yaml --set dump.url=https://host/b", 78, ["holds no dumps; write s3://bucket/prefix"]),
    ("dump x.yaml --set dump.url=hf://b", 78, ["no repository of the hub; write hf://datasets/USER/NAME"]),
    ("train x.yaml --set train.checkpoint_url=hf://datasets/a/b", 78, ["has no put-if-absent"]),
    ("dump x.yaml --set dump.url=gcs://", 78, ["names no bucket"]),
    ("dump x.yaml --set dump.url=s3:/bucket/x", 78, ["too few slashes; write s3://"]),
    ("dump x.yaml --set dump.url=${SCRATCH}/x", 78, ["environment variables are not expanded"]),
    ("dump x.yaml --set dump.url=h", 78, ["heldout.url -> must differ from dump.url"]),
    ("dump x.yaml --set dump.storage_options.secret_access_key=canary", 78, ["AWS_SECRET_ACCESS_KEY"]),
    ("dump x.yaml --set dump.url=s3://u:canary@b/x", 78, ["a secret must not stand here"]),
    ("dump x.yaml --set estimator.kind=adaptive --set loss.divergence=reverse_kl", 78, ["must be forward_kl"]),
    ("preview x.yaml --heldout --set heldout=null", 78, ["`llm-neo preview --heldout` needs the section `heldout`"]),
    ("run x.yaml --set teacher=null", 78, ["`llm-neo run` needs the section `teacher`"]),
    # Stage one.
    ("dump x.yaml --set teacher.model=techer NEW", 78, ["techer is no directory", "correct teacher.model"]),
    ("dump x.yaml --set teacher.model=./techer NEW", 78, ["this is no hub id", "a relative path begins"]),
    ("dump x.yaml --set teacher.model=a/b NEW", 78, ["`hf download a/b`", "HF_HOME"]),
    ("dump x.yaml --set teacher.model=torn NEW", 65, ["is torn", "fetch or copy"]),
    ("dump x.yaml --set teacher.model=base NEW", 65, ["need a chat template", "use an instruct"]),
    ("dump x.yaml --set teacher.device=gpu NEW", 78, ["there is no device gpu", "correct teacher.device"]),
    ("dump x.yaml --set teacher.backend=vllm --set dump.logsumexp=false NEW", 78, ["pip install 'llm-neo[vllm]'"]),
    ("dump x.yaml --set estimator.k=1000000 NEW", 78, ["at most 320", "lower it"]),
    ("dump x.yaml --set estimator.k=4", 78, ["made with other settings: estimator.k", "estimator.k = 8"]),
    ("dump x.yaml --set teacher.dtype=bf16", 78, ["teacher.dtype = bfloat16", "teacher.dtype = float32"]),
    ("dump x.yaml --set dump.samples_per_unit=2", 78, ["samples_per_unit = 4", "choose another dump.url"]),
    ("dump x.yaml --set corpus.sources.0.path=h.jsonl", 65, ["the held-out samples are in the training corpus"]),
    ("dump x.yaml --set dump.url=a.jsonl", 78, ["cannot be written to", "is no directory", "correct dump.url"]),
    ("dump x.yaml --set dump.url=run --set train=null", 78, ["holds something else", "choose another dump.url"]),
    ("dump x.yaml --set dump.url=student --set train=null", 78, ["holds something else", "config.json in it"]),
    ("dump x.yaml --set dump.url=runs --set train.output=runs/a", 78, ["--set: train.output -> lies in the dump runs"]),
    ("dump placed.yaml --set dump.url=runs", 78, ["placed.yaml and --set dump.url: train.output -> lies in the dump"]),
    ("preview x.yaml --set teacher.model=m/techer", 78, ["m/techer is no directory", "correct teacher.model"]),
    ("preview x.yaml --set corpus.sources.0.path=no.jsonl", 65, ["no file no.jsonl", "a relative path begins"]),
    ("preview x.yaml --set corpus.sources.0.path=data/*.jsonl", 65, ["no file data/*.jsonl"]),
    ("preview x.yaml --set corpus.sources.0.path=a.csv", 65, ["columns a, b", "corpus.sources[].columns"]),
    ("preview x.yaml --set corpus.sources.0.path=semicolons.csv", 65, ["columns a;b", "by commas in a .csv"]),
    ("preview x.yaml --set corpus.sources.0.path=roles.jsonl", 65, ["unknown role: 'agent'", "corpus.sources[].roles"]),
    ("preview x.yaml --set corpus.sources.0.path=a.pdf", 65, ["ends in .pdf"]),
    ("preview x.yaml --set corpus.sources.0.path=a/b", 65, ["cannot be read: a/b", "download it first"]),
    ("preview x.yaml --set corpus.sources.0.path=torn.jsonl", 65, ["torn.jsonl, line 1: not a JSON object"]),
    ("preview x.yaml --set corpus.sources.0.path=none.jsonl",
     65, ["no sample of the corpus can be used", "no records"]),
    ("preview x.yaml --set corpus.sources.0.path=columns.jsonl", 65, ["columns foo", "corpus.sources[].columns"]),
    ("preview x.yaml --set corpus.sources.0.split=test", 65, ["Unknown split", "['train']"]),
    ("preview x.yaml --set corpus.sources.0.weight=2", 78, ["must be at most 1", "raise train.epochs"]),
    ("preview x.yaml --set corpus.max_length=3", 65, ["12 cut before an answer begins", "corpus.max_length"]),
    ("verify absent", 65, ["there is no dump at absent", "check the URL"]),
    ("verify damaged", 65, ["unit 1:", "it computes this unit alone"]),
    ("verify d --recompute 2 --model student", 78, ["is not the teacher that made the dump", "recompute with teacher"]),
    ("inspect x.yaml", 65, ["there is no dump at x.yaml"]),
    # Stage two.
    ("train x.yaml --set dump.url=absent NEW --set train.data_wait_seconds=0.1", 75, ["start stage one"]),
    ("train x.yaml --set dump.url=unsealed NEW --set train.data_wait_seconds=0.1", 75, ["see that stage one runs"]),
    ("train x.yaml --set train.output=d", 78, ["lies in the dump d (dump.url); choose a directory outside"]),
    ("train x.yaml --set train.output=a.jsonl", 78, ["Not a directory", "correct train.output"]),
    ("train x.yaml --set train.output=student", 78, ["holds what no training has left there"]),
    ("train x.yaml --set student.model=studnt NEW", 78, ["studnt is no directory", "`hf download studnt`"]),
    ("train x.yaml --set student.model=weightless NEW", 78, ["a file named model.safetensors", "convert other weight"]),
    ("train x.yaml --set student.model=foreign NEW", 78, ["is not the teacher's", "teacher '<s>', student 'w0'"]),
    ("train x.yaml --set student.lora.target_modules=[qproj] NEW", 78, ["PEFT rejected", "target_modules"]),
    ("train x.yaml --set student.adapter=absent NEW", 78, ["no such directory", "correct student.adapter"]),
    ("train x.yaml --set student.adapter=run/final --set train.method=full_kd NEW", 78, ["lora_sft or lora_kd"]),
    ("train x.yaml --set train.deepspeed=ds.json NEW", 78, ["contradicts train.global_batch_size", "remove"]),
    ("train x.yaml --set train.deepspeed={fp16: {enabled: true}} NEW", 64, ["quote a value"]),
    ("train x.yaml --set 'train.deepspeed={fp16: {enabled: true}}' NEW", 78, ["train.precision instead"]),
    ("train x.yaml --set loss.temperature=2 --set teacher=null NEW", 78, ["one of [1.0]", "dump again"]),
    ("train x.yaml --set estimator.k=9 NEW", 78, ["estimator.k = 9", "training has them from the dump"]),
    ("train x.yaml --set train.lr_scheduler_kwargs={a: 1}", 64, ["quote a value"]),
    ("train x.yaml --set train.resume=must NEW", 66, ["no valid checkpoint to resume from"]),
    ("train x.yaml --set train.resume=never", 78, ["has been used", "train.resume: auto"]),
    ("train x.yaml --set train.seed=9", 78, ["the checkpoint is of another run: train.seed", "train.seed = 0"]),
    ("train x.yaml --set train.epochs=2", 78, ["train.max_steps = 6", "train.extend: true goes on"]),
    ("train x.yaml --set train.method=full_kd", 78, ["train.method = full_kd", "choose another train.output"]),
    # Results.
    ("evaluate --model absent --dump h", 78, ["absent is no directory", "HF_HOME"]),
    ("evaluate --model run --dump h", 78, ["the directory of a run", "give run/final"]),
    ("evaluate --model d --dump h", 78, ["no config.json in it", "give the directory of a model"]),
    ("evaluate --model student --dump unsealed", 75, ["8 of 12 samples", "--partial"]),
    ("evaluate --model student --dump h --temperature 2", 78, ["one of [1.0]", "--temperature"]),
    ("evaluate --model student --dump h --device cuda", 78, ["there is no device cuda", "correct --device"]),
    ("evaluate --model student --dump h --device meta", 78, ["there is no device meta", "correct --device"]),
    ("evaluate --model student --dump h --revision main", 64, ["student is a directory", "--revision main"]),
    ("evaluate --model student --model teacher --dump h --base student", 78, ["is no adapter", "leave out --base"]),
    ("evaluate --model moved --dump h", 78, ["/gone/model", "--base DIR"]),
    ("merge moved m", 78, ["/gone/model", "--base DIR"]),
    ("merge student m", 78, ["student is not an adapter", "no adapter_config.json"]),
    ("merge absent m", 78, ["no such directory"]),
    ("chat run --prompt hi", 78, ["give run/final"]),
    ("status x.yaml absent", 75, ["there is no run in absent yet"]),
    ("config diff x.yaml d", 64, ["d is no run directory", "train.output"]),
]  # fmt: skip
"""Words after `llm-neo`, exit code, parts of the message. NEW is a run directory, or a dump, that is not there yet."""
ALLOWED: list[tuple[str, list[str]]] = [
    ("train x.yaml", ["run is finished: 3 steps; nothing to do"]),
    ("train x.yaml --set train.learning_rate=1e-2", ["nothing to do"]),
    ("dump x.yaml --set teacher.model=./teacher", ["fingerprint"]),
    ("train x.yaml --set student.model=teacher --set train.output=same", ["there is nothing to distil, their KL is 0"]),
    ("train x.yaml --set train.arm=neo", ["train.arm is called train.method now (here: lora_kd)"]),
]  # fmt: skip
"""What looks like a mistake, and is none, or none that must be refused."""


class World:
    """A folder in which every mistake can be made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "world"
        self.folder.mkdir()
        self._out = folder / "out"
        self._server = ForkServer(str(TESTS / "support" / "mistakes.py"))

    def run(self, **job: object) -> tuple[int | str, str]:
        """Exit code, and all that was printed."""
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        code = self._server.run({"folder": str(self.folder), "out": str(self._out)} | job)
        return code, self._out.read_text(errors="replace")

    def close(self) -> None:
        """End the process that forks."""
        self._server.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = World(tmp_path_factory.mktemp("mistakes"))
    code, printed = found.run()
    assert code == 0, printed[-4000:]
    yield found
    found.close()


def wrong_with(words: str, code: int, parts: list[str], world: World) -> list[str]:
    """What is wrong with the answer to a mistake."""
    # What a shell would make of it is wanted only where something is quoted.
    split = shlex.split(words) if "'" in words else words.split(" ")
    new = {"train": ["train.output=new"], "dump": ["dump.url=new", "heldout=null"]}.get(split[0], [])
    split = [part for word in split for part in (set_arguments(new) if word == "NEW" else [word])]
    got, printed = world.run(words=split)
    line = " ".join(printed.replace("│", " ").split())  # Of a terminal of any width.
    found = [f"exit code {got}"] if got != code else []
    found += [f"does not say: {part}" for part in parts if " ".join(part.split()) not in line]
    found += [f"says: {word}" for word in ("Traceback", "this is a bug", "canary") if word in printed]
    told = ("to do:", "expected:", " -> ", "Error", '"errors"', "errors ")
    if code and not any(word in printed for word in told):
        found.append("says neither what was expected nor what to do")
    return [f"llm-neo {words}: {'; '.join(found)}\n{printed[-1500:]}"] if found else []


def test_every_mistake_is_told_with_what_to_do(world: World) -> None:
    began = time.monotonic()
    wrong = [text for mistake in MISTAKES for text in wrong_with(*mistake, world)]
    assert not wrong, f"{len(wrong)} of {len(MISTAKES)}:\n" + "\n".join(wrong)
    assert len({words for words, *_ in MISTAKES}) == len(MISTAKES) >= 60
    assert {code for _, code, _ in MISTAKES} == {int(code) for code in Exit} - {Exit.DONE, Exit.BUG}
    print(f"{time.monotonic() - began:.1f} s")


def test_no_dump_is_begun_beside_one_that_is_refused(world: World) -> None:
    words = ["dump", "x.yaml", *set_arguments(["dump.url=student", "heldout.url=new", "train=null"])]
    code, printed = world.run(words=words)
    assert (code, "config.json in it" in printed) == (78, True)
    assert not (world.folder / "new").exists()


def test_what_is_allowed_goes_on(world: World) -> None:
    wrong = [text for words, parts in ALLOWED for text in wrong_with(words, 0, parts, world)]
    assert not wrong, "\n".join(wrong)


def test_held_out_samples_are_known_however_their_place_is_written(world: World) -> None:
    for url in ("h", "h/", "./h", "d/../h", str(world.folder / "h"), f"file://{world.folder}/h"):
        code, printed = world.run(words=["verify", url, "--recompute", "2", "--config", "x.yaml"])
        assert code == 0, (url, printed)


def test_a_page_may_take_the_place_of_a_page(world: World) -> None:
    pages = (["inspect", "d", "--row", "0"], ["report", "run", "--samples", "0"])
    for words in (*pages, *pages):
        code, printed = world.run(words=[*words, "--html", "page.html"])
        assert code == 0, (words, printed)
