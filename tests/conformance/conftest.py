"""`--policy`: the policy that the suite judges. Without it: the built-in ones and the example."""

import pytest

from engine.scheduler.policy import names

EXAMPLE = "tests/conformance/example_policy.py:StaticBatching"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--policy", help="policy under test: a name, package.module:Name or path/to/file.py:Name")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "policy" in metafunc.fixturenames:
        given = metafunc.config.getoption("--policy", None)
        metafunc.parametrize("policy", [given] if given else [*names(), EXAMPLE])
