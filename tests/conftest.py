"""All tests run on CPU, whatever the machine has."""

import jax

jax.config.update("jax_platforms", "cpu")
