"""Small nets trained here: the replicas of the transfer curves, and models of text and of chains of hops."""

from importlib import import_module
from typing import Any

__all__ = ["k_hop", "language", "replicas"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"lab.nets.{name}")
    raise AttributeError(f"module 'lab.nets' has no attribute {name!r}")
