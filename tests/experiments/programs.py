"""Runs a program in its own process, as a user does, with the timed engine in place of the real one when asked to."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRIVER = """
import runpy, sys
from experiments import common_flags
from tests.experiments.timed_engine import RealClock, timed_engine
common_flags.load_engine = lambda model, config: timed_engine(
    clock=RealClock(), token_s=1e-5, decode_s=0.002,
    num_pages=config.cache.num_pages or 4000, max_context=config.max_context or 1024,
)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def start(program: str, *flags: str, timed: bool = False, cwd: Path = ROOT) -> subprocess.Popen:
    """Starts `python -m experiments.<program>`; stdout and stderr are pipes of text."""
    module = f"experiments.{program}"
    command = ["-c", DRIVER, module] if timed else ["-m", module]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, *command, *flags], cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1
    )


def run(program: str, *flags: str, timed: bool = False, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(program, *flags, timed=timed, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
