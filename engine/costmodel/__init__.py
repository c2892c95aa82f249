"""How long a step takes on a device that is not here: a roofline per op with about a dozen constants. No JAX.

`device.py` facts and constants with their provenance, `roofline.py` dense ops, `attention.py` and `paper_kernels.py`
attention, `tables.py` measured times that win over a formula, `step_model.py` a whole step, `memory.py` what fits.
"""
