"""`mooncake:FILE` and `bailian:FILE`: JSON-lines traces that record which prompts share prefixes.

Mooncake (Qin et al., FAST 2025; kvcache-ai/Mooncake, FAST25-release/traces): `timestamp` in ms, `input_length`,
`output_length`, and `hash_ids`, one id per 512 prompt tokens; equal ids mean equal tokens in that block and before it.
Bailian (alibaba-edu/qwen-bailian-usagetraces-anon): the same with seconds and blocks of 16, and conversations:
`chat_id`, and `parent_chat_id` of the turn before (-1: none).

Tokens follow from (seed, hash id, position in the block), so equal ids are equal tokens. `scale_len` and
`scale_prompt` scale every block, so what was shared stays shared. `block=` overrides the block size; `think=` (Bailian,
closed loop) is the think time, which the trace does not record.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from engine.config import cdiv
from engine.errors import WorkloadError
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.content import Blocks
from experiments.workloads.rows import field, json_lines, seconds, tokens
from experiments.workloads.sessions import think_seconds

MOONCAKE_BLOCK, BAILIAN_BLOCK = 512, 16  # tokens


@register("mooncake")
def mooncake(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Reads the trace up to the last wanted row; arrivals count from the first row.

    Raises:
      WorkloadError: no such file, or a malformed row (file:line, field, what was expected).
    """
    rows = _read(file, options, window, MOONCAKE_BLOCK, unit=1e-3)
    return [request for request, _, _ in rows]


@register("bailian")
def bailian(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """As `mooncake`, with the conversations as sessions.

    Raises:
      WorkloadError: see `mooncake`.
    """
    think_s = think_seconds(options)
    requests: list[WorkloadRequest] = []
    chats: dict[Any, tuple[str, int]] = {}  # chat id -> its session and turn
    for request, row, where in _read(file, options, window, BAILIAN_BLOCK, unit=1.0):
        chat, parent = field(row, "chat_id", where), field(row, "parent_chat_id", where)
        former = chats.get(parent)  # None also when the trace begins in the middle of a conversation
        session, turn = (str(chat), 0) if former is None else (former[0], former[1] + 1)
        chats[chat] = session, turn
        think = None if former is None else think_s
        requests.append(dataclasses.replace(request, session=session, turn=turn, think_s=think))
    return requests


def _read(
    file: str | None, options: Options, window: Window, default_block: int, unit: float
) -> list[tuple[WorkloadRequest, dict[str, Any], str]]:
    """Requests with their rows and places, without sessions."""
    if file is None:
        raise options.error("this workload needs a file: NAME:FILE.jsonl")
    block = options.integer("block", default_block)
    end = None if window.num is None else window.start + window.num
    result: list[tuple[WorkloadRequest, dict[str, Any], str]] = []
    first = previous = 0.0
    for where, row in json_lines(Path(file)):
        previous = seconds(row, "timestamp", where, unit, previous)
        first = first if result else previous
        prompt, output = tokens(row, "input_length", where), tokens(row, "output_length", where)
        content = Blocks(_hash_ids(row, cdiv(prompt, block), where), block)
        request = WorkloadRequest(str(len(result)), previous - first, prompt, output, window.seed, content)
        result.append((request, row, where))
        if len(result) == end:
            break  # what follows is not even parsed
    return result


def _hash_ids(row: dict[str, Any], expected: int, where: str) -> tuple[int, ...]:
    ids = field(row, "hash_ids", where)
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**64 for i in ids):
        raise WorkloadError(f"{where}: field hash_ids: expected a list of integers >= 0, got {str(ids)[:80]}")
    if len(ids) != expected:
        raise WorkloadError(
            f"{where}: field hash_ids: expected {expected} ids for input_length {row['input_length']}, got {len(ids)}"
        )
    return tuple(ids)
