"""Frozen workloads: what a spec built, in a file that proves it is unchanged. `frozen:FILE` replays one.

JSON lines. The header says what was frozen, for which vocabulary, and the content hash; each row is one request with
its own digest: the SHA-256 of its columns as compact JSON (arrival_s, output_len, sampling, session, turn, think_s,
priority unless 0) and of its prompt's token ids as little-endian int32. The content hash is the SHA-256 of all digests
in order. Prompts are stored as what they follow from (a seed; block ids; explicit ids), but the digest covers the
tokens themselves, so a generator that changed is noticed, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.errors import WorkloadError
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.content import Blocks, TokenIds
from experiments.workloads.rows import field, json_lines

VERSION = 1
COLUMNS = ("arrival_s", "prompt_len", "output_len", "session", "turn", "think_s", "priority")
DIGEST_CHARACTERS = 16  # of a row's digest in the file; the content hash takes all of it


def workload_hash(requests: Iterable[WorkloadRequest], vocab_size: int) -> str:
    """The content hash, 64 hexadecimal digits: equal exactly when the same requests come at the same times.

    Args:
      vocab_size: of the model; a workload that was frozen for a smaller one keeps its own.

    Raises:
      WorkloadError: the workload was frozen for a larger vocabulary.
    """
    return _combined([_digest(r, vocab_size) for r in requests])


def freeze(requests: Sequence[WorkloadRequest], spec: str, seed: int, vocab_size: int) -> tuple[str, str]:
    """The text of a frozen workload's file, and its content hash.

    Raises:
      WorkloadError: a prompt's tokens do not fit the vocabulary.
    """
    digests = [_digest(r, vocab_size) for r in requests]
    vocab_size = requests[0].vocab_size or vocab_size
    header = {
        "folio_workload": VERSION,
        "spec": spec,
        "seed": seed,
        "num_requests": len(requests),
        "vocab_size": vocab_size,
        "sha256": _combined(digests),
    }
    rows = [_row(r) | {"sha256": d[:DIGEST_CHARACTERS]} for r, d in zip(requests, digests, strict=True)]
    return "".join(json.dumps(line) + "\n" for line in [header, *rows]), header["sha256"]


@register("frozen")
def frozen(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """All requests of the file; the options common to all workloads apply to them, but not `seed`.

    Raises:
      WorkloadError: no such file, a malformed row, or one that is not what was frozen (file:line).
    """
    if file is None:
        raise options.error("frozen needs a file: frozen:FILE.jsonl")
    if options.text("seed") is not None:
        raise options.error("a frozen workload has its seed already")
    lines = list(json_lines(Path(file)))
    where, header = lines[0] if lines else (f"{file}:1", {})
    if field(header, "folio_workload", where) != VERSION:
        raise WorkloadError(f"{where}: field folio_workload: expected version {VERSION}")
    vocab_size, expected = field(header, "vocab_size", where), field(header, "sha256", where)
    requests, digests = [], []
    for place, row in lines[1:]:
        request, digest = _checked(row, vocab_size, place)
        if field(row, "sha256", place) != digest[:DIGEST_CHARACTERS]:
            raise WorkloadError(f"{place}: not what was frozen: sha256 is {digest[:DIGEST_CHARACTERS]}")
        requests.append(request)
        digests.append(digest)
    number, found = field(header, "num_requests", where), _combined(digests)
    if (len(requests), found) != (number, expected):
        raise WorkloadError(f"{where}: not what was frozen: {len(requests)} of {number} rows, sha256 is {found}")
    return requests


def _combined(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(r: WorkloadRequest, vocab_size: int) -> str:
    columns = [float(r.arrival_s), r.output_len, r.sampling, r.session, r.turn, r.think_s]
    columns += [r.priority] if r.priority else []
    state = hashlib.sha256(json.dumps(columns, separators=(",", ":")).encode())
    state.update(r.prompt_tokens(vocab_size).astype("<i4").tobytes())
    return state.hexdigest()


def _row(r: WorkloadRequest) -> dict[str, Any]:
    """The columns of a request; those at their defaults are left out."""
    row: dict[str, Any] = {"arrival_s": r.arrival_s, "prompt_len": r.prompt_len, "output_len": r.output_len}
    if isinstance(r.content, TokenIds):
        row["ids"] = r.content.ids[: r.prompt_len]
    else:
        row["seed"] = r.token_seed
    if isinstance(r.content, Blocks):
        row |= {"hash_ids": r.content.ids, "block": r.content.size}
    if r.session is not None:
        row |= {"session": r.session, "turn": r.turn, "think_s": r.think_s}
    if r.priority:
        row["priority"] = r.priority
    return row | ({"sampling": dict(r.sampling)} if r.sampling else {})


def _checked(row: dict[str, Any], vocab_size: int, where: str) -> tuple[WorkloadRequest, str]:
    """A row's request and its digest."""
    content = None
    try:
        if "ids" in row:
            content = TokenIds(tuple(row["ids"]))
        elif "hash_ids" in row:
            content = Blocks(tuple(row["hash_ids"]), row["block"])
        request = WorkloadRequest(
            id="",  # numbered when the workload is complete
            token_seed=row.get("seed", 0),
            content=content,
            vocab_size=vocab_size,
            sampling=tuple(row.get("sampling", {}).items()),
            **{name: row[name] for name in COLUMNS if name in row},
        )
        return request, _digest(request, vocab_size)
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as e:
        raise WorkloadError(f"{where}: not a row of a frozen workload: {e}") from None
