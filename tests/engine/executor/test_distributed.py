"""Two processes connected by `jax.distributed` on loopback serve one model under one scheduler."""

import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.executor import distributed
from engine.models.weights import export_hf, init_params
from experiments.convert_checkpoint import convert_hf
from tests.engine.identity import check_close
from tests.engine.tiny import WIDE, prompts
from tests.experiments import programs

PROMPTS = prompts([63, 60, 17])
LEAD = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from engine import CacheConfig, Engine, EngineConfig, SchedulerConfig, SamplingParams
from engine.executor import distributed
from tests.engine.executor.test_distributed import PROMPTS
model, out, coordinator = sys.argv[1:]
if coordinator:
    distributed.start(coordinator, 2, 0)
config = EngineConfig(
    cache=CacheConfig(num_pages=16), scheduler=SchedulerConfig(max_num_seqs=2), max_context=128, query_tile=64,
    max_tiles=1, capture_logits=True, debug_checks=True, poison=True, tensor=2 if coordinator else 1,
    compilation_cache_dir=None,
)
engine = Engine.from_pretrained(model, config)
assert len(engine.executor.mesh.devices.flat) == config.tensor
forced = np.load(out)["tokens"] if coordinator else [()] * len(PROMPTS)
params = [SamplingParams(max_tokens=8, ignore_eos=True, forced_tokens=tuple(map(int, f))) for f in forced]
outputs = engine.generate(PROMPTS, params)
assert sum(o.metrics.num_preemptions for o in outputs) > 0
out = out if not coordinator else out + "2"
np.savez(out, tokens=[o.token_ids for o in outputs], logits=[o.logits for o in outputs])
if coordinator:
    assert jax.process_count() == 2 and len(engine.executor._kv.k.addressable_shards) == 1
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def children():
    """Processes that are gone after the test: `jax.distributed` ignores SIGTERM."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def lead(*arguments: str) -> subprocess.Popen:
    environment = {"PYTHONPATH": str(programs.ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(
        [sys.executable, "-c", LEAD, *arguments], cwd=programs.ROOT, env=environment, text=True, stdout=-1, stderr=-1
    )


def follow(port: int) -> subprocess.Popen:
    return programs.start("follow", f"--coordinator=127.0.0.1:{port}", "--process_id=1")


def test_two_processes_serve_what_one_does(tmp_path, children):
    """The same tokens under the same decisions, preemptions included, logits within invariant 4 (b)."""
    export_hf(init_params(WIDE), WIDE, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "orbax", None)  # each process restores its part
    out = str(tmp_path / "one.npz")
    port = free_port()
    alone = lead(str(tmp_path / "orbax"), out, "")
    children.append(alone)
    assert alone.wait(120) == 0, alone.communicate()[1][-3000:]
    children += [follow(port), lead(str(tmp_path / "orbax"), out, f"127.0.0.1:{port}")]
    _, err = children[2].communicate(timeout=240)
    assert children[2].returncode == 0, err[-3000:]
    said, err = children[1].communicate(timeout=60)
    assert children[1].returncode == 0 and "process 1: process 0 ended after" in said, err[-3000:]
    one, two = np.load(out), np.load(out + "2.npz")
    np.testing.assert_array_equal(one["tokens"], two["tokens"])
    check_close(one["logits"].reshape(-1, WIDE.vocab_size), two["logits"].reshape(-1, WIDE.vocab_size))


@pytest.mark.long
def test_an_interrupt_ends_both(children):
    """Ctrl-C in the middle of decoding: process 0 says so, the other goes home."""
    port = free_port()
    flags = ("--model=tiny-1m", "--num_pages=400", "--prompt_ids=1,2,3", "--max_tokens=1500", "--ignore_eos")
    where = (f"--coordinator=127.0.0.1:{port}", "--tensor=2", "--compilation_cache_dir=")
    children += [follow(port), programs.start("generate", *flags, *where)]
    assert children[1].stdout.readline().startswith("[Gloo]")
    assert children[1].stdout.read(20)  # it is decoding
    children[1].send_signal(signal.SIGINT)
    _, err = children[1].communicate(timeout=60)
    assert children[1].returncode == 130 and "generate: interrupted" in err
    said, err = children[0].communicate(timeout=60)
    assert children[0].returncode == 0 and "process 0 ended after" in said, err[-3000:]


@pytest.mark.parametrize("address", ["foo", "foo:", ":1", "foo:0", "foo:x", "foo:65536", ""])
def test_an_address_that_is_none_is_refused(address):
    """JAX would raise an IndexError, or wait."""
    with pytest.raises(ConfigError, match="expected host:port of process 0"):
        distributed.check_address(address)


def test_an_address():
    for address in ("localhost:1", "10.0.0.1:65535", "[::1]:80"):
        distributed.check_address(address)


@pytest.mark.parametrize(
    "config, message",
    [
        (EngineConfig(), "tensor=1: 2 processes have a device each at least"),
        (EngineConfig(tensor=4), "tensor=4: on CPU 2 processes have 2 devices"),
        (EngineConfig(CacheConfig(host_bytes=4096), tensor=2), "host_bytes=4096: a host tier works in one process"),
        (EngineConfig(executor="sim", tensor=2), "executor=sim works in one process"),
    ],
)
def test_what_two_processes_cannot_do(config, message):
    with pytest.raises(ConfigError, match=message):
        distributed.check(config, 2)
    distributed.check(EngineConfig(tensor=2), 2)


def test_nobody_is_waited_for_in_vain():
    """There is no process 1: this would take minutes."""
    flags = ("--model=tiny-1m", "--prompt_ids=1,2,3", f"--coordinator=127.0.0.1:{free_port()}", "--tensor=3")
    code, _, stderr = programs.run("generate", *flags)
    assert code == 2 and stderr == "generate: tensor=3: on CPU 2 processes have 2 devices\n"


def test_settings_that_cannot_work_end_both(children):
    """Process 0 says what is wrong; the other ends without having built anything."""
    port = free_port()
    flags = ("--model=nowhere", "--prompt_ids=1,2,3", f"--coordinator=127.0.0.1:{port}", "--tensor=2")
    children += [follow(port), programs.start("generate", *flags)]
    _, err = children[1].communicate(timeout=60)
    assert children[1].returncode == 2 and "model 'nowhere' is neither a directory nor a preset" in err
    said, err = children[0].communicate(timeout=60)
    assert children[0].returncode == 0 and "process 0 ended after 0 calls" in said, err[-3000:]
