"""Runs a program in its own process, as a user does, with the timed engine in place of the real one when asked to."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
TIMED = """
from experiments import common_flags
from engine.clock import WallClock
from tests.experiments.timed_engine import timed_engine
common_flags.load_engine = lambda model, config: timed_engine(
    clock=WallClock(), token_s=1e-5, decode_s=0.002,
    num_pages=config.cache.num_pages or 4000, max_context=config.max_context or 1024,
)
"""
LIMITED = """
import resource, sys
sys.dont_write_bytecode = True  # or Python leaves broken .pyc files
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


def start(
    program: str, *flags: str, timed: bool = False, cwd: Path = ROOT, max_file_bytes: int | None = None
) -> subprocess.Popen:
    """Starts `python -m experiments.<program>`; stdout and stderr are pipes of text. With `max_file_bytes` the disk is
    full for whatever makes a file larger."""
    driver = (LIMITED.format(max_file_bytes) if max_file_bytes else "") + (TIMED if timed else "") + RUN
    command = ["-c", driver, f"experiments.{program}"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *command, *flags], cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1
    )


def run(program: str, *flags: str, **options) -> tuple[int, str, str]:
    """Exit code, stdout, stderr; options as `start`."""
    process = start(program, *flags, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
