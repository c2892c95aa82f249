"""The policy protocol and its registry. A policy decides, outside jit; it never asks which executor it drives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.config import SchedulerConfig
from engine.errors import ConfigError
from engine.scheduler.plan import Plan
from engine.scheduler.state import SchedulerState


class Policy(Protocol):
    """Plans steps over a `SchedulerState`."""

    mixes: bool  # whether a step may prefill and decode at once

    def plan(self, now: float) -> Plan:
        """The next step at time `now` (seconds on the engine's clock); an empty plan when nothing can run."""
        ...


PolicyFactory = Callable[[SchedulerConfig, SchedulerState, int], Policy]
_POLICIES: dict[str, PolicyFactory] = {}


def register_policy(name: str) -> Callable[[PolicyFactory], PolicyFactory]:
    """Class decorator: `--policy=NAME` constructs it with (config, state, token budget per step)."""

    def add(factory: PolicyFactory) -> PolicyFactory:
        _POLICIES[name] = factory
        return factory

    return add


def names() -> list[str]:
    """Registered policies."""
    from engine.scheduler import vllm_v0  # noqa: F401  (registers itself)

    return sorted(_POLICIES)


def make_policy(config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int) -> Policy:
    """Builds the configured policy.

    Raises:
      ConfigError: an unknown name; lists the known ones.
    """
    known = names()
    if config.policy not in known:
        raise ConfigError(f"policy {config.policy!r} is unknown; known: {', '.join(known)}")
    return _POLICIES[config.policy](config, state, max_batched_tokens)
