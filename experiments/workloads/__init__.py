"""Workloads: who arrives when, with how many prompt tokens, and how many tokens it produces.

A workload is named by a spec, `name[:file][,option=value]...`:

    synthetic:rate=2,arrivals=poisson,num=100,prompt=lognormal:256:512,output=fixed:64
    azure:TRACE.csv,num=200,scale_len=0.25,rate_scale=0.5     azure-like:num=100,rate=1.5
    sharegpt:FILE.json,rate=1,loop=closed,think=2             sharegpt-like:num=100,rate=1.5
    mooncake:FILE.jsonl    bailian:FILE.jsonl                 burst:num=16,context=8192,output=64
    vidur:FILE.csv                                            frozen:FILE.jsonl, or FILE.jsonl alone
    package.module:Name,option=value    path/to/file.py:Name,option=value    a builder of your own

`build` parses the spec, calls the builder registered under the name (each source's own options are in its file), then
applies the options common to all:

    num, start    how many requests to keep, after skipping `start` of them (sessions: see below)
    seed          of arrivals, lengths and token ids (default 0)
    scale_len     multiplies prompt and output lengths (at least 1 token stays)
    scale_prompt, scale_output    the same for one of the two; default scale_len
    max_prompt, max_output    clip lengths, after scaling
    rate_scale    multiplies the arrival rate; time_scale multiplies the gaps, think times too (give one)
    loop          open: every request is due at its time. closed: a turn of a session is due its think time after the
                  turn before it has ended. Default: open; frozen workloads keep theirs
    temperature, top_k, top_p    sampling of all requests; greedy by default
    priorities    each request draws one of so many, 0 the first, for --order=priority (default: as recorded, or 0)

Sessions are conversations: each turn's prompt is the former prompt, the former output's length in tokens and what the
user adds, so that prefixes are real; lengths scale by what each turn adds.

Same spec, same requests, bit for bit. A smaller `num` is a prefix of a larger one in the order in which `num` and
`start` count: by arrival; where sessions have no recorded times (`synthetic`, `sharegpt`) one session after the other,
so that all are whole but the last, and with `start` the first. Turns that a cut leaves out are said in one line. Ids
number what is kept, by arrival. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from engine import extension
from engine.errors import WorkloadError
from engine.request import SamplingParams
from experiments.workloads.content import Blocks, TokenIds, stream_keys, stream_tokens


@dataclass(frozen=True)
class WorkloadRequest:
    """One request of a workload. It produces exactly `output_len` tokens (end-of-sequence ids are ignored)."""

    id: str
    arrival_s: float  # due, seconds after the start of the run
    prompt_len: int  # tokens
    output_len: int  # tokens
    token_seed: int = 0  # of its prompt's token ids; the turns of a session share it
    content: Blocks | TokenIds | None = None  # None: the first prompt_len tokens of token_seed's stream
    vocab_size: int | None = None  # the vocabulary its tokens are drawn from; None: the model's
    sampling: tuple[tuple[str, Any], ...] = ()  # fields of SamplingParams; none: greedy
    session: str | None = None
    turn: int = 0
    priority: int = 0  # lower goes first under --order=priority
    think_s: float | None = None  # closed loop: due so long after the session's former turn ended, whatever arrival_s

    def prompt_tokens(self, vocab_size: int) -> np.ndarray:
        """Token ids, int32 [prompt_len]; uniform over the vocabulary where a trace records only lengths.

        Raises:
          WorkloadError: the tokens were drawn from, or lie outside, what the model's vocabulary of `vocab_size` holds.
        """
        own = self.vocab_size or vocab_size
        if own > vocab_size:
            raise WorkloadError(
                f"the workload was frozen for a vocabulary of {own}, this model has {vocab_size}: "
                f"freeze it again with --vocab_size={vocab_size}"
            )
        if self.content is not None:
            return self.content.tokens(self.token_seed, self.prompt_len, own)
        return stream_tokens(stream_keys(self.token_seed), np.arange(self.prompt_len), own)


class Options:
    """The `option=value` part of a spec. Reading one marks it as known; `finish` refuses what nobody read."""

    def __init__(self, spec: str, values: dict[str, str]):
        self.spec = spec
        self._values = values
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        """The option as written, or None when it is not given."""
        self._known.append(name)
        return self._values.get(name)

    def optional_number(self, name: str) -> float | None:
        """A finite number > 0, or None when it is not given."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf"):
            raise self.error(f"{name} must be a number > 0, got {text!r}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number > 0."""
        value = self.optional_number(name)
        return default if value is None else value

    def optional_integer(self, name: str, low: int = 1) -> int | None:
        """An integer >= `low`, or None when it is not given."""
        text = self.text(name)
        if text is None:
            return None
        if not text.isdecimal() or int(text) < low:
            raise self.error(f"{name} must be an integer >= {low}, got {text!r}")
        return int(text)

    def integer(self, name: str, default: int, low: int = 1) -> int:
        """An integer >= `low`."""
        value = self.optional_integer(name, low)
        return default if value is None else value

    def choice(self, name: str, known: Sequence[str], default: str) -> str:
        """One of `known`."""
        text = self.text(name) or default
        if text not in known:
            raise self.error(f"{name} must be one of {', '.join(known)}, got {text!r}")
        return text

    def finish(self) -> None:
        """Raises WorkloadError for an option that no reader asked for."""
        unknown = sorted(set(self._values) - set(self._known))
        if unknown:
            raise self.error(f"unknown option {', '.join(unknown)}; known: {', '.join(dict.fromkeys(self._known))}")

    def error(self, what: str) -> WorkloadError:
        """An error that quotes the spec."""
        return WorkloadError(f"workload {self.spec!r}: {what}")


@dataclass(frozen=True)
class Window:
    """Which requests are wanted, known to a builder so that it can generate or read no more than that."""

    start: int
    num: int | None  # None: all there are (a generator's default otherwise)
    seed: int

    def end(self, default_num: int) -> int:
        """Index after the last wanted request of a generator."""
        return self.start + (self.num if self.num is not None else default_num)


Builder = Callable[[str | None, Options, Window], list[WorkloadRequest]]
_BUILDERS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Registers a builder `(file, options, window) -> requests [0, window.end)`, or more, under a spec name; in the
    order in which they count, by arrival within each session."""

    def add(builder: Builder) -> Builder:
        _BUILDERS[name] = builder
        return builder

    return add


def names() -> list[str]:
    """Registered workload names."""
    _load_builtin()
    return sorted(_BUILDERS)


def build(spec: str) -> list[WorkloadRequest]:
    """The requests of a spec, in order of arrival, the first one due at 0 s when `start` skipped any.

    Raises:
      WorkloadError: an unknown name or option, a value out of range, or a file that cannot be read (file:line named).
    """
    name, file, values = _parse(spec)
    known = names()
    if name not in known and "." in name and extension.is_external(f"{name}:{file}"):
        builder, file = extension.load(f"{name}:{file}", "workload"), None
    elif name not in known:
        raise WorkloadError(f"workload {spec!r}: unknown name {name!r}; known: {', '.join(known)}")
    else:
        builder = _BUILDERS[name]
    options = Options(spec, values)
    window = Window(
        options.integer("start", 0, low=0), options.optional_integer("num"), options.integer("seed", 0, low=0)
    )
    requests = builder(file, options, window)
    loop = options.choice("loop", ("open", "closed"), "closed" if name == "frozen" else "open")
    scaled = _length_transform(options)
    finish = _common_transform(options, closed=loop == "closed", seed=window.seed)
    options.finish()
    kept = list(enumerate(requests))[window.start :][: window.num]
    if not kept:
        raise options.error(f"no request is left: {len(requests)} available, start={window.start}")
    if window.num is not None and len(kept) < window.num:
        raise options.error(f"num={window.num} from start={window.start}, but only {len(kept)} requests are there")
    if options.text("loop") == "closed" and all(r.think_s is None for _, r in kept):
        raise options.error("loop=closed needs sessions with a think time, and there are none")
    _say_what_is_cut(spec, requests, [r for _, r in kept])
    kept.sort(key=lambda counted: counted[1].arrival_s)
    t0 = kept[0][1].arrival_s if window.start else 0.0
    return [
        finish(scaled(dataclasses.replace(r, id=str(i), arrival_s=r.arrival_s - t0)), number)
        for i, (number, r) in enumerate(kept, window.start)
    ]


def _say_what_is_cut(spec: str, requests: Sequence[WorkloadRequest], kept: Sequence[WorkloadRequest]) -> None:
    """A line when sessions lose turns that the builder knows of."""
    turns, left = (Counter(r.session for r in part if r.session is not None) for part in (requests, kept))
    cut = [session for session in left if left[session] < turns[session]]
    if cut:
        lost = sum(turns[session] - left[session] for session in cut)
        of = f"{len(cut)} of the {len(left)} sessions"
        logging.warning("workload %r: num and start cut %s (turns left out: %d)", spec, of, lost)


def with_options(spec: str, given: Mapping[str, str]) -> str:
    """The spec with options replaced or added."""
    if not given:
        return spec
    name, file, values = _parse(spec)
    items = [file] if file else []
    items += [f"{key}={value}" for key, value in (values | dict(given)).items()]
    return f"{name}:{','.join(items)}"


def seed_of(spec: str) -> int:
    """The seed that a valid spec gives; 0 by default."""
    return int(_parse(spec)[2].get("seed", 0))


def mean_rate(requests: Sequence[WorkloadRequest]) -> float:
    """Mean arrival rate in requests/s between the first and the last arrival.

    Raises:
      WorkloadError: they all arrive at once, so there is no rate.
    """
    span = requests[-1].arrival_s - requests[0].arrival_s
    if span <= 0:
        raise WorkloadError(f"all {len(requests)} requests arrive at once: they have no rate")
    return (len(requests) - 1) / span


def _parse(spec: str) -> tuple[str, str | None, dict[str, str]]:
    name, _, rest = spec.partition(":")
    if name.partition(",")[0].endswith(".jsonl"):
        name, rest = "frozen", spec
    items = [item for item in rest.split(",") if item]
    file = items.pop(0) if items and "=" not in items[0] else None
    values: dict[str, str] = {}
    for item in items:
        key, eq, value = item.partition("=")
        if not eq or not key or not value:
            raise WorkloadError(f"workload {spec!r}: expected option=value, got {item!r}")
        if key in values:
            raise WorkloadError(f"workload {spec!r}: option {key} is given twice")
        values[key] = value
    return name, file, values


def _length_transform(options: Options) -> Callable[[WorkloadRequest], WorkloadRequest]:
    """Scales and clips lengths; called with the requests in order, because a turn's prompt builds on the former's."""
    scale = options.number("scale_len", 1.0)
    scale_prompt, scale_output = options.number("scale_prompt", scale), options.number("scale_output", scale)
    max_prompt = options.optional_integer("max_prompt") or 2**31
    max_output = options.optional_integer("max_output") or 2**31
    lengths: dict[str, tuple[int, int]] = {}  # session -> tokens up to the end of its last turn, recorded and scaled

    def apply(r: WorkloadRequest) -> WorkloadRequest:
        output = min(max_output, max(1, round(r.output_len * scale_output)))
        if isinstance(r.content, Blocks):
            content, prompt = r.content.scaled(r.prompt_len, scale_prompt)
        else:
            recorded, so_far = lengths.get(r.session or "", (0, 0))
            content, prompt = r.content, so_far + max(1, round((r.prompt_len - recorded) * scale_prompt))
        prompt = min(max_prompt, prompt)
        if isinstance(content, TokenIds) and prompt > len(content.ids):
            raise options.error(f"request {r.id} has {len(content.ids)} known tokens and cannot become {prompt} long")
        if r.session is not None:
            lengths[r.session] = (r.prompt_len + r.output_len, prompt + output)
        return dataclasses.replace(r, prompt_len=prompt, output_len=output, content=content)

    return apply


def _common_transform(options: Options, closed: bool, seed: int) -> Callable[[WorkloadRequest, int], WorkloadRequest]:
    """Times, the loop, sampling and priorities; called with a request and its number in the order of the builder."""
    rate_scale, time_scale = options.optional_number("rate_scale"), options.optional_number("time_scale")
    if rate_scale and time_scale:
        raise options.error("rate_scale and time_scale say the same thing; give one of them")
    stretch = time_scale or 1.0 / (rate_scale or 1.0)
    given: dict[str, Any] = {
        "temperature": options.optional_number("temperature"),
        "top_k": options.optional_integer("top_k"),
        "top_p": options.optional_number("top_p"),
    }
    priorities, keys = options.optional_integer("priorities"), stream_keys(seed)
    sampling = tuple((name, value) for name, value in given.items() if value is not None)
    SamplingParams(**dict(sampling))  # refuses what is out of range before anything runs

    def apply(r: WorkloadRequest, number: int) -> WorkloadRequest:
        think = r.think_s * stretch if closed and r.think_s is not None else None
        changes: dict[str, Any] = {"sampling": sampling} if sampling else {}
        if priorities:
            changes["priority"] = int(stream_tokens(keys, np.array([number]), priorities)[0])
        return dataclasses.replace(r, arrival_s=r.arrival_s * stretch, think_s=think, **changes)

    return apply


def _load_builtin() -> None:
    """Importing the modules registers their builders."""
    from experiments.workloads import azure, burst, frozen, mooncake, sharegpt, synthetic, vidur  # noqa: F401
