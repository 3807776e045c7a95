"""The experiment's YAML: what may stand in it (`schema`), how it is read (`read`), and what an
error says of it.
"""

from mtl.config.document import ConfigError, dump
from mtl.config.read import load, parse
from mtl.config.schema import Config

__all__ = ["Config", "ConfigError", "dump", "load", "parse"]
