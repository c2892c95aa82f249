"""All tests run on CPU, whatever the machine has; kernels for other devices are interpreted or compiled without them."""

import jax

jax.config.update("jax_platforms", "cpu")
