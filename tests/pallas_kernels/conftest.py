"""The kernel tests run on CPU, whatever else the machine has."""

import jax

jax.config.update("jax_platforms", "cpu")
