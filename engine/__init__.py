"""Folio: a research engine for the KV cache of LLM serving.

    from engine import Engine, EngineConfig, SamplingParams

Names resolve lazily: importing `engine` imports no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
    from engine.engine import Engine
    from engine.outputs import RequestOutput
    from engine.request import SamplingParams

_HOMES = {
    "CacheConfig": "engine.config",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "ModelConfig": "engine.config",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.request",
    "SchedulerConfig": "engine.config",
}

__all__ = ["CacheConfig", "Engine", "EngineConfig", "ModelConfig", "RequestOutput", "SamplingParams", "SchedulerConfig"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
