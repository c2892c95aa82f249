"""Makes `results.npz` and the saved checkpoint with `transformers`: `python -m tests.golden.generate`.

Needs torch and transformers (5.x), not JAX. Refuses to write results on which a test could pass or fail by luck: the
standard deviation of the logits must be >= 1, and the best token must lead the second by >= 1e-3 at every step.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden import HERE, NUM_TOKENS, prompt, weight
from tests.golden.configs import CONFIGS, SAVED, SAVED_CONFIG


def build(config: dict, seed: int) -> transformers.PreTrainedModel:
    """The model that transformers makes of this config.json, with the formula's weights."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        parsed = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied weights occur once
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), seed)))
    return model.eval()


@torch.inference_mode()
def run(model: transformers.PreTrainedModel, start: np.ndarray) -> dict[str, np.ndarray]:
    """Greedy tokens without a cache, then the logits of them all from one pass over the whole sequence."""
    ids = torch.from_numpy(start.astype(np.int64))[None]
    for _ in range(NUM_TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    logits = model(ids[:, :-1], use_cache=False).logits[0, len(start) - 1 :].numpy()
    tokens = ids[0, len(start) :].numpy().astype(np.int32)
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    assert (logits.argmax(-1) == tokens).all()
    assert logits.std() >= 1, f"logit std {logits.std()}"
    assert (best - second).min() >= 1e-3, f"top-2 margin {(best - second).min()}"
    assert len(set(tokens.tolist())) >= 16, "the continuation repeats itself"
    return {"prompt": start, "tokens": tokens, "logits": logits}


def main() -> None:
    results = {}
    for variant, (seed, config) in {**CONFIGS, SAVED: SAVED_CONFIG}.items():
        model = build(config, seed)
        try:
            values = run(model, prompt(config))
        except AssertionError as error:
            raise SystemExit(f"{variant}: {error}; choose another seed") from error
        results |= {f"{variant}/{field}": value for field, value in values.items()}
        logits = values["logits"]
        print(f"{variant}: std {logits.std():.2f}, {len(set(values['tokens'].tolist()))} different tokens")
        if variant == SAVED:
            model.save_pretrained(HERE / SAVED, max_shard_size="60KB")
    np.savez_compressed(HERE / "results.npz", **results)


if __name__ == "__main__":
    main()
