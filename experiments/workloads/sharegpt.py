"""`sharegpt:FILE` turns conversations into sessions; `sharegpt-like` draws only their lengths.

The file is a JSON list of `{"conversations": [{"from": ..., "value": ...}, ...]}`, as ShareGPT dumps are (`role` and
`content` are read too). Everything said to the model since its last answer is a turn's new prompt and the answer its
output; an answer to nothing joins the context, a question without an answer is dropped, and a conversation without any
turn is skipped. Chat templates are not applied.

    tokenizer=DIR      with DIR/tokenizer.json: prompts are the real token ids
                       without: a message of c characters counts ceil(c / 4) tokens, and ids are seeded
    rate, arrivals, cv    of session starts, as in `synthetic`; the file has no times
    turns=N            at most N turns of a conversation
    think=S            seconds from an answer's end to the next turn (default 1)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import cdiv
from engine.errors import WorkloadError
from engine.tokenizer import FILE, INSTALL, load_tokenizer
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.content import TokenIds
from experiments.workloads.rows import field, json_value, read_text
from experiments.workloads.sessions import in_sessions, think_seconds
from experiments.workloads.synthetic import arrival_times, token_seeds

ANSWERING = ("gpt", "assistant", "chatgpt", "bing", "bard")
ASKING = ("human", "user", "system", "tool")
CHARACTERS_PER_TOKEN = 4  # English under the usual tokenizers

# Quantiles of the first turns of ShareGPT V3 in Llama 2 tokens, computed from the 10,000 lengths that
# github.com/AKafakA/vidur_opt_scheduler publishes (sharegpt_val_10k_llama2.csv, MIT; no text). Prompt and output are
# nearly independent (Spearman 0.14) and are drawn so.
PROBABILITIES = (
    0, 0.01, 0.05, 0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70,
    0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 0.999, 1,
)  # fmt: skip
PROMPT_TOKENS = (1, 2, 7, 9, 13, 18, 24, 35, 55, 101, 143, 229, 404, 761, 1423, 2306, 2862, 3711, 3973)
OUTPUT_TOKENS = (3, 10, 23, 43, 106, 167, 232, 286, 341, 405, 446, 502, 571, 681, 839, 953, 1000, 1125, 1734)
DEFAULT_NUM = 100
PROMPTS, OUTPUTS = 20, 21  # random streams

Encode = Callable[[str], list[int]]
Talk = tuple[list[tuple[int, int]], TokenIds | None]  # (new prompt tokens, output tokens) of each turn; all its tokens


@register("sharegpt-like")
def sharegpt_like(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Requests [0, window.end) of one turn, with ShareGPT's lengths; arrivals as in `synthetic`.

    Raises:
      WorkloadError: an option out of range.
    """
    if file is not None:
        raise options.error(f"sharegpt-like reads no file (sharegpt:FILE does), got {file!r}")
    n = window.end(DEFAULT_NUM)

    def draw(stream: int, table: tuple[int, ...]) -> list[int]:
        uniform = np.random.default_rng([window.seed, stream]).random(n)
        return np.rint(np.interp(uniform, PROBABILITIES, table)).astype(int).tolist()

    columns = (draw(PROMPTS, PROMPT_TOKENS), draw(OUTPUTS, OUTPUT_TOKENS), token_seeds(n, window.seed))
    rows = zip(arrival_times(options, n, window.seed), *columns, strict=True)
    return [WorkloadRequest(str(i), *row) for i, row in enumerate(rows)]


@register("sharegpt")
def sharegpt(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Reads as many conversations as the wanted requests need, one session each.

    Raises:
      WorkloadError: no such file or tokenizer, or a malformed conversation (its index, the message's and the field).
    """
    if file is None:
        raise options.error("sharegpt needs a file: sharegpt:FILE.json")
    encode = _encoder(options)
    most, think_s = options.optional_integer("turns"), think_seconds(options)
    entries = json_value(read_text(Path(file)), file)
    if not isinstance(entries, list):
        raise WorkloadError(f"{file}: expected a JSON list of conversations, got {type(entries).__name__}")
    talks: list[Talk] = []
    num_turns = 0
    for index, entry in enumerate(entries):
        if window.num is not None and num_turns >= window.start + window.num:
            break
        talk = _talk(entry, encode, most, f"{file}: conversation {index}")
        if talk[0]:
            talks.append(talk)
            num_turns += len(talk[0])
    starts, seeds = arrival_times(options, len(talks), window.seed), token_seeds(len(talks), window.seed)
    return in_sessions(starts, [turns for turns, _ in talks], seeds, think_s, [content for _, content in talks])


def _encoder(options: Options) -> Encode | None:
    directory = options.text("tokenizer")
    if directory is None:
        return None
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        missing = f"the tokenizers library: {INSTALL}" if (Path(directory) / FILE).exists() else f"{directory}/{FILE}"
        raise options.error(f"tokenizer={directory} needs {missing}")
    return tokenizer.encode


def _talk(entry: Any, encode: Encode | None, most: int | None, where: str) -> Talk:
    """A conversation's turns."""
    messages = field(entry, "conversations", where) if isinstance(entry, dict) else None
    if not isinstance(messages, list):
        raise WorkloadError(f"{where}: expected an object with a list of conversations")
    special = encode("") if encode else []  # such as bos, which encode puts before every text
    turns: list[tuple[int, int]] = []
    ids, said, answered = list(special), len(special), 0  # `said`: tokens so far; `answered`: up to the last turn's end
    asked = False
    for number, message in enumerate(messages):
        if len(turns) == most:
            break
        answering, text = _message(message, f"{where}: message {number}")
        new = encode(text)[len(special) :] if encode else []
        length = len(new) if encode else cdiv(len(text), CHARACTERS_PER_TOKEN)
        if not length:
            continue
        if answering and asked:
            turns.append((said - answered, length))
            answered, asked = said + length, False
        ids += new
        said += length
        asked = asked or not answering
    return turns, TokenIds(tuple(ids)) if encode else None


def _message(message: Any, where: str) -> tuple[bool, str]:
    """(whether the model says it, text)."""
    if not isinstance(message, dict):
        raise WorkloadError(f"{where}: expected an object with from and value, got {str(message)[:80]!r}")
    role = field(message, "role" if "role" in message else "from", where)
    text = field(message, "content" if "content" in message else "value", where)
    if role not in ANSWERING + ASKING:
        raise WorkloadError(f"{where}: field from: expected one of {', '.join(ASKING + ANSWERING)}, got {role!r}")
    if not isinstance(text, str):
        raise WorkloadError(f"{where}: field value: expected text, got {str(text)[:80]!r}")
    return role in ANSWERING, text
