"""`tensor`: the same decisions and tokens on 1, 2 and 4 virtual CPU devices, and what the compiler made of the layer.

Devices are asked for before JAX starts, so each test runs this file as a program of its own.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", ["same_tokens", "layer_program"])
def test_on_four_devices(part):
    run = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_tensor_axis", part],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1] == "done"


def same_tokens():
    """Invariant 4 (b), teacher-forced, every policy with preemptions; on four devices two hold the same kv head."""
    import numpy as np

    from engine.request import SamplingParams
    from tests.engine.identity import OUTPUT, check_close, serve, variant
    from tests.engine.tiny import WIDE, prompts, tiny_engine

    model = WIDE.replace(name="all-kinds", qkv_bias=True, qk_norm=True, tie_embeddings=True)
    loads = prompts([63, 17, 63, 40, 63])
    policies = {"vllm_v0": {}, "vllm_v1": {"preemption": "swap"}, "chunked": {"budget": 40}}
    runs, forced = {}, [()] * len(loads)
    for tensor in (1, 2, 4):
        device = tiny_engine(model, num_pages=14, tensor=tensor, host_pages=28, query_tile=64, max_tiles=1)
        for policy, options in policies.items():
            params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=t) for t in forced]
            engine = variant(device, policy=policy, **options)
            outputs, preemptions = serve(engine, loads, params, [0, 0, 1, 0, 2])
            assert preemptions > 0
            assert any(o.metrics.num_swaps for o in outputs) == ("preemption" in options)
            forced = [tuple(o.token_ids) for o in outputs] if not runs else forced
            assert [tuple(o.token_ids) for o in outputs] == forced
            steps = [(s.num_decode, s.prefill_tokens, s.free_pages, s.num_preempted) for s in engine.step_log]
            runs[tensor, policy] = steps, np.concatenate([o.logits for o in outputs])
    for tensor in (2, 4):
        for policy in policies:
            (expected_steps, expected), (steps, logits) = runs[1, policy], runs[tensor, policy]
            if policy != "vllm_v1":  # when a copy lands, and is seen, is a matter of time
                assert steps == expected_steps
            check_close(expected, logits)
            assert np.any(logits != expected)  # sums in another order: several devices did work


def layer_program():
    """One all-reduce after o-proj, one after down-proj; nothing gathered or moved; the arena updated in place."""
    from engine.executor.packing import Bucket
    from engine.models import llama, tensors
    from tests.engine.executor.test_programs import compile_layer
    from tests.engine.tiny import WIDE

    for heads in (4, 1):
        model = WIDE.replace(num_kv_heads=heads)
        for bucket in (Bucket(8, 0, 16), Bucket(8, 4, 16)):
            compiled, arena = compile_layer(model, 4096, bucket, tensor=4)
            ops = re.findall(r"= [^=]*? ([a-z-]+)\(", compiled.as_text())
            assert ops.count("all-reduce") + ops.count("all-reduce-start") == 2, ops
            for moved in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
                assert not any(op.startswith(moved) for op in ops)
            memory, shard = compiled.memory_analysis(), (arena.k.nbytes + arena.v.nbytes) // 4
            assert shard <= memory.alias_size_in_bytes < 1.01 * shard
            assert memory.temp_size_in_bytes < shard / 4
            weights = tensors.num_bytes(llama.definitions(model, 4)["layers"][0], 4)
            assert memory.argument_size_in_bytes < 1.05 * (shard + weights)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    {"same_tokens": same_tokens, "layer_program": layer_program}[sys.argv[1]]()
    print("done")
