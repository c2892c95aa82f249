"""Classes that are no policies, or break the protocol: one line that names the policy, before weights if possible."""

import pytest

from engine.config import SchedulerConfig
from engine.errors import ConfigError, PolicyError
from engine.request import SamplingParams
from engine.scheduler.policy import find_policy, make_policy
from tests.engine.fake import fake_engine

MINE = """
class Policy:
    mixes = False

    def __init__(self, {parameters}):
        {body}

    def plan(self, now):
        return None
"""


@pytest.fixture
def written(tmp_path):
    """Names a policy in a file of its own, made with these parameters."""

    def write(parameters="config, state, max_batched_tokens", body="pass") -> str:
        path = tmp_path / f"p{len(list(tmp_path.iterdir()))}.py"
        path.write_text(MINE.format(parameters=parameters, body=body))
        return f"{path}:Policy"

    return write


@pytest.mark.parametrize("parameters", ["state", "config, state", "config, state, budget, other"])
def test_a_class_that_is_made_otherwise(written, parameters):
    """Found where the name is looked up, as other wrong names are."""
    with pytest.raises(ConfigError, match=r"Policy' must be made with \(config, state, max_batched_tokens\): "):
        find_policy(written(parameters))
    find_policy(written("*anything"))
    find_policy(written("config, state, budget, other=1"))


def test_a_class_that_fails_when_it_is_made(written):
    """The line in the file is named; what a policy refuses itself it says itself."""
    with pytest.raises(PolicyError, match=r"cannot be made: AttributeError: .*no attribute 'slos' \(.*p0\.py:6\)"):
        fake_engine(8, policy=written(body="config.slos"))
    refuses = "from engine.errors import ConfigError; raise ConfigError('no')"
    with pytest.raises(ConfigError, match=r"^no$"):
        fake_engine(8, policy=written(body=refuses))


def test_a_plan_that_is_none(written):
    """And the engine serves on when it gets plans."""
    engine = fake_engine(8, policy=written())
    engine.add_request([1] * 20, SamplingParams(max_tokens=5))
    with pytest.raises(PolicyError, match=r"Policy': plan must return what state.make_plan returns, got None"):
        engine.step()
    engine.policy = make_policy(SchedulerConfig(), engine.state, 4096)
    while engine.has_work():
        done = engine.step()
    assert len(done[-1].token_ids) == 5 and engine.store.num_free_pages == engine.store.num_pages
