"""The configuration from Python; what people type is in `pipeline.cli`."""

from typing import TYPE_CHECKING

from storage_schemas.common.public import lazily

if TYPE_CHECKING:
    from pipeline.config import Config, load_config

__all__ = ["Config", "load_config"]
__getattr__ = lazily(__name__, dict.fromkeys(("Config", "load_config"), "config"))
