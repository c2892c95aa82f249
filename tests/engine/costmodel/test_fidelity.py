"""Against measured operators and steps: what WORKSPACE.md quotes is at least this good."""

import csv
from pathlib import Path

import numpy as np
import pytest

from experiments import fidelity

PROFILES = Path(__file__).parents[4] / "shared/profiles"
STEPS = PROFILES / "aiconfigurator/derived/step_times_llama3.1-8b.csv"
shared = pytest.mark.skipif(not PROFILES.exists(), reason="needs ../shared/profiles")


@pytest.mark.parametrize("device", ["a100", "h100", "l40s"])
def test_steps_of_llama_3_1_8b(device):
    """19 prefills and decodes on each: at most 6% off in the mean, no point more than 15%."""
    errors = np.abs(fidelity.composed_errors(device))
    assert len(errors) == 19 and errors.mean() <= 0.06 and errors.max() <= 0.15


def test_the_two_published_steps_of_an_h200():
    """Within 10%."""
    assert np.abs(fidelity.composed_errors("h200")).max() <= 0.1


@pytest.mark.parametrize("model", list(fidelity.VIDUR_MODELS))
def test_layers_as_another_simulator_has_them(model):
    """vidur's predictions for 2 A100s under its own stack: 12% in the mean, no point more than 25%."""
    errors = np.abs(fidelity.vidur_step_errors(model))
    assert len(errors) == 18 and errors.mean() <= 0.12 and errors.max() <= 0.25


@shared
def test_products_of_an_a100():
    """Every product in vidur's tables: 9% in the mean; the four of a layer together: 7%."""
    products, layers = fidelity.vidur_product_errors(PROFILES)
    assert len(products) == 4 * len(layers) == 15_648
    assert np.abs(products).mean() <= 0.09 and np.abs(layers).mean() <= 0.07


@shared
def test_the_published_figures_are_those_of_their_source():
    """Every step time of three devices, digit by digit."""
    names = {"a100_sxm": "a100", "h100_sxm": "h100", "l40s": "l40s"}
    devices = fidelity.published("composed")["devices"]
    with STEPS.open() as file:
        for row in csv.DictReader(file):
            steps = devices[names[row["system"]]]
            if row["phase"] == "static_ctx":
                assert [int(row["isl"]), float(row["aic_ms"])] in steps["prefill"]
            else:
                assert [int(row["batch"]), int(row["isl"]), float(row["aic_ms"])] in steps["decode"]


def test_the_table_says_all(capsys):
    """One line for every comparison."""
    from absl import flags

    flags.FLAGS([""])
    assert fidelity.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | points | MAPE | largest error |" and len(lines) >= 2 + 6
