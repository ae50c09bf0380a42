"""Imported by every Python process that has this directory on PYTHONPATH: notes which classes are unpickled.

LLM_NEO_AUDIT names the file: one line per process, `start <argv>`, and one per event, `pickle.find_class <name>` or
`open <file>` of a kind that torch.load reads, whose own unpickler of weights tells no class.
"""

import os
import sys

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def note(line: str) -> None:
    with open(os.environ["LLM_NEO_AUDIT"], "a", encoding="utf-8") as file:
        file.write(line + "\n")


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class" or (event == "open" and str(arguments[0]).endswith(PICKLED)):
        note(f"{event} {arguments} in {sys.argv}")


if "LLM_NEO_AUDIT" in os.environ:
    sys.addaudithook(hook)
    note("start " + " ".join(sys.orig_argv))
