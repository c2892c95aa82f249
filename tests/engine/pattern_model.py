"""What the pattern executor computes instead of a model: KV and tokens that can be known beforehand."""

import zlib

import numpy as np

from engine.config import ModelConfig
from engine.request import Request

MODEL = ModelConfig("pattern", 3, 32, 4, 2, 8, 64, 200, 60, eos_token_ids=(7,))
EMPTY, LOST = -1, -2  # KV that poison leaves, and that a failed copy in leaves


def patterns(serial: int, layer: int, positions: np.ndarray) -> np.ndarray:
    """KV of tokens of a request in a layer, int64 [n]."""
    return (serial << 32) + (layer << 24) + positions.astype(np.int64)


def sampled_token(prompt: np.ndarray, seed: int, position: int) -> int:
    """The token that a model with these weights would put at `position`."""
    return zlib.crc32(b"%d %d" % (seed, position), zlib.crc32(prompt.tobytes())) % MODEL.vocab_size


def sequence_token(request: Request, position: int) -> int:
    """The token at any position of a request, known before it is served."""
    index, p = position - len(request.prompt), request.params
    if index < 0:
        return int(request.prompt[position])
    if index < len(p.forced_tokens):
        return p.forced_tokens[index]
    return sampled_token(request.prompt, 0 if p.greedy else request.seed, position)


def expected_output(request: Request) -> list[int]:
    """All tokens that the request must produce, whatever the schedule."""
    tokens = []
    for position in range(len(request.prompt), request.max_length):
        tokens.append(sequence_token(request, position))
        if tokens[-1] in request.stop_ids:
            break
    return tokens
