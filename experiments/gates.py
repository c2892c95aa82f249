"""What an issue asks for, judged: a gate is a limit and what was reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tables import format_table

WORDS = {True: "passed", False: "missed", None: "-"}


@dataclass(frozen=True)
class Gate:
    """A limit, and what was reached."""

    name: str
    limit: str
    reached: str
    passed: bool | None  # None: there was nothing to judge


def gate_table(found: Sequence[Gate]) -> str:
    """A line per gate."""
    return format_table(
        ["gate", "limit", "reached", ""], [[g.name, g.limit, g.reached, WORDS[g.passed]] for g in found]
    )
