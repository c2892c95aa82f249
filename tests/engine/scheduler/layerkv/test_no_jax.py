"""The parts of the policy run where JAX is not."""

import pkgutil
import subprocess
import sys

from engine.scheduler import layerkv


def test_no_jax():
    """Every module of the package, imported by itself."""
    names = [f"{layerkv.__name__}.{module.name}" for module in pkgutil.iter_modules(layerkv.__path__)]
    script = f"import sys, {', '.join(names)}; print({{'jax', 'engine.executor'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
