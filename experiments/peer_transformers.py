"""`transformers` as a peer, in a process of its own: reads jobs from stdin, one JSON object per line.

    python experiments/peer_transformers.py DIR float32
    <- {"versions": {...}, "threads": 2}                        once the model is loaded
    -> {"prompts": [[1, 2], [3, 4]], "new_tokens": 8}           prompts of one length
    <- {"times": [t1, ..., t8], "tokens": [[...], [...]]}       seconds from the call to the i-th token of every row

Needs only torch and transformers, so that it can run under another interpreter than ours.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

INSTALL = "pip install 'folio[peer]'"


class TokenTimes:
    """A stopping criterion that never stops: `generate` calls it after every token."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **unused: Any) -> Any:
        """Notes the time; no row is done."""
        import torch  # pyright: ignore[reportMissingImports]

        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def answer(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens of equally long prompts, and when each became known."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import GenerationConfig, StoppingCriteriaList  # pyright: ignore[reportMissingImports]

    clock = TokenTimes()
    ids = torch.tensor(prompts)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    with torch.inference_mode():
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return {"times": [t - start for t in clock.times], "tokens": output[:, ids.shape[1] :].tolist()}


def main() -> int:
    """The program."""
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing but replies on stdout
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        print(json.dumps({"error": f"{e.name} is not installed for {sys.executable}: {INSTALL}"}), file=replies)
        return 3
    transformers.utils.logging.disable_progress_bar()
    directory, dtype = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "threads": torch.get_num_threads()}), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(answer(model, job["prompts"], job["new_tokens"])), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
