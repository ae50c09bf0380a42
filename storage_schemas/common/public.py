"""What a package offers by its own name is imported when it is asked for: `import student_train` needs no torch."""

import sys
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any


def lazily(package: str, names: Collection[str], *modules: str) -> Callable[[str], Any]:
    """A package's `__getattr__`.

    Args:
        package: its `__name__`.
        names: its `__all__`.
        modules: those below it that hold them, imported in this order until one has the name.
    """

    def attribute(name: str) -> Any:
        for module in map(import_module, (f"{package}.{each}" for each in modules if name in names)):
            if hasattr(module, name):
                setattr(sys.modules[package], name, getattr(module, name))
                return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return attribute
