"""Sessions: conversations whose turns are requests."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.workloads import Options, WorkloadRequest
from experiments.workloads.content import TokenIds

DEFAULT_THINK_S = 1.0


def think_seconds(options: Options) -> float:
    """The option `think`: seconds from the end of a turn until the user sends the next one."""
    return options.number("think", DEFAULT_THINK_S)


def in_sessions(
    starts: Sequence[float],
    talks: Sequence[Sequence[tuple[int, int]]],
    seeds: Sequence[int],
    think_s: float,
    contents: Sequence[TokenIds | None] | None = None,
) -> list[WorkloadRequest]:
    """The turns of all sessions, one session after the other.

    A turn's prompt is everything said before it and its own new tokens. Arrivals, for the open loop, are the session's
    start plus `think_s` per turn, as if answers took no time: such workloads record no times of their own.

    Args:
      starts: when each session's first turn is due, seconds, not decreasing.
      talks: per session, (new prompt tokens, output tokens) of each turn.
      seeds: per session, of its token stream.
      contents: per session, the tokens of the whole conversation, where they are known.
    """
    requests: list[WorkloadRequest] = []
    for session, (start, talk) in enumerate(zip(starts, talks, strict=True)):
        said = 0
        for turn, (new, output) in enumerate(talk):
            requests.append(
                WorkloadRequest(
                    id="",  # numbered when the workload is complete
                    arrival_s=start + turn * think_s,
                    prompt_len=said + new,
                    output_len=output,
                    token_seed=seeds[session],
                    content=contents[session] if contents is not None else None,
                    session=str(session),
                    turn=turn,
                    think_s=think_s if turn else None,
                )
            )
            said += new + output
    return requests
