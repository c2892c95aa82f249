"""The policy protocol and its registry. A policy decides, outside jit; it never asks which executor it drives."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from engine import extension
from engine.config import SchedulerConfig
from engine.errors import ConfigError, FolioError, PolicyError
from engine.scheduler.plan import Plan
from engine.scheduler.state import SchedulerState


@dataclass(frozen=True, slots=True)
class Observed:
    """Steps that have been collected: one, or some of those that one plan stands for. Times are seconds."""

    plan: Plan
    first: int  # how many of the plan's steps were collected before these
    start: float  # of the first of these
    ends: list[float]


class Policy(Protocol):
    """Plans steps over a `SchedulerState`. Its class may have

    - `default_budget`: tokens per step when `max_num_batched_tokens` is not set (without one: max(context, 2048),
      vLLM v0's rule);
    - `horizon(plan) -> int`: how many steps, `plan` the first, are sure to be the same decodes if nothing arrives
      (without one: 1), which lets the virtual clock run them at once (`scheduler/horizon.py`);
    - `observe(Observed)`, `copied(copies)` and `ended(request)`: told of steps collected, copies that have ended, and
      requests that have stopped or reached their length, before the next plan. There is no other way to learn them.
    - `needs_host`: whether it moves KV to the host whatever `preemption` says; `parks`: whether it parks layers of
      running sequences, and so needs transient pages as well.
    """

    mixes: bool  # whether a step may prefill and decode at once

    def plan(self, now: float) -> Plan:
        """The next step at time `now` (seconds on the engine's clock); an empty plan when nothing can run before what
        is in flight (a step, a copy) has ended. With nothing in flight some request can always run: the engine raises
        PolicyError when the policy finds none and has not preempted either."""
        ...


PolicyFactory = Callable[[SchedulerConfig, SchedulerState, int], Policy]
_POLICIES: dict[str, PolicyFactory] = {}


def register_policy(name: str) -> Callable[[Any], Any]:
    """Class decorator: `--policy=NAME` constructs it with (config, state, token budget per step)."""

    def add(factory: PolicyFactory) -> PolicyFactory:
        _POLICIES[name] = factory
        return factory

    return add


def names() -> list[str]:
    """Registered policies."""
    from engine.scheduler import chunked, vllm_v0, vllm_v1  # noqa: F401  (they register themselves)
    from engine.scheduler.layerkv import paged_park, policy  # noqa: F401

    return sorted(_POLICIES)


def find_policy(name: str) -> PolicyFactory:
    """The class behind `--policy`.

    Raises:
      ConfigError: an unknown name (lists the known ones), or one that is no policy or cannot be made as one.
    """
    known = names()
    if name in known:
        return _POLICIES[name]
    if not extension.is_external(name):
        raise ConfigError(f"policy {name!r} is unknown; known: {', '.join(known)}, or {extension.FORMS}")
    found = extension.load(name, "policy")
    if not callable(found) or not callable(getattr(found, "plan", None)) or not hasattr(found, "mixes"):
        raise ConfigError(f"policy {name!r} is not a policy: it needs a class with `plan(now)` and `mixes`")
    try:
        inspect.signature(found).bind("config", "state", "max_batched_tokens")
    except TypeError as e:
        raise ConfigError(f"policy {name!r} must be made with (config, state, max_batched_tokens): {e}") from None
    return cast(PolicyFactory, found)


def token_budget(config: SchedulerConfig, context: int) -> int:
    """Tokens that a step may compute: `max_num_batched_tokens`, or the policy's default.

    Raises:
      ConfigError: no such policy.
    """
    default = getattr(find_policy(config.policy), "default_budget", None)
    return config.max_num_batched_tokens or default or max(context, 2048)


def parks(config: SchedulerConfig) -> bool:
    """Whether the policy parks layers of running sequences.

    Raises:
      ConfigError: no such policy.
    """
    return bool(getattr(find_policy(config.policy), "parks", False))


def needs_host(config: SchedulerConfig) -> bool:
    """Whether the policy moves KV to the host whatever `preemption` says.

    Raises:
      ConfigError: no such policy.
    """
    return bool(getattr(find_policy(config.policy), "needs_host", False)) or parks(config)


def make_policy(config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int) -> Policy:
    """Builds the configured policy.

    Raises:
      ConfigError: no such policy.
      PolicyError: one from outside the tree fails when it is made; says where and why.
    """
    factory = find_policy(config.policy)
    try:
        return factory(config, state, max_batched_tokens)
    except Exception as e:
        if isinstance(e, FolioError) or not extension.is_external(config.policy):
            raise
        last = traceback.extract_tb(e.__traceback__)[-1]
        why = f"{type(e).__name__}: {e} ({last.filename}:{last.lineno})"
        raise PolicyError(f"policy {config.policy!r} cannot be made: {why}") from e
