"""A dump, read without torch: what it is made of, and the settings and errors that both stages share."""

from typing import TYPE_CHECKING

from storage_schemas.common.public import lazily

if TYPE_CHECKING:
    from storage_schemas.common.errors import DataError, MismatchError, NeoError, TemporaryError
    from storage_schemas.config import Adaptive, DumpSection, Sampled, TopK
    from storage_schemas.provenance import Provenance
    from storage_schemas.reader import Dump
    from storage_schemas.rows import Row, UnitRows
    from storage_schemas.targets import Decoded, Targets, decode

__all__ = [
    "Adaptive", "DataError", "Decoded", "Dump", "DumpSection", "MismatchError", "NeoError", "Provenance", "Row",
    "Sampled", "Targets", "TemporaryError", "TopK", "UnitRows", "decode",
]  # fmt: skip
__getattr__ = lazily(
    __name__,
    {
        **dict.fromkeys(("DataError", "MismatchError", "NeoError", "TemporaryError"), "common.errors"),
        **dict.fromkeys(("Adaptive", "DumpSection", "Sampled", "TopK"), "config"),
        "Provenance": "provenance",
        "Dump": "reader",
        **dict.fromkeys(("Row", "UnitRows"), "rows"),
        **dict.fromkeys(("Decoded", "Targets", "decode"), "targets"),
    },
)
