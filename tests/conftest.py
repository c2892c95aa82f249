"""Tests run on the CPU, whatever accelerator the machine has."""

import jax

jax.config.update("jax_platforms", "cpu")
