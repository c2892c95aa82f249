"""A process beside process 0 that lends its devices to it; on every host but the first:

    python -m experiments.follow --coordinator=HOST:PORT --num_processes=2 --process_id=1

Process 0 is any other program, on HOST, with `--coordinator=HOST:PORT --num_processes=2 --tensor=N`: N devices in all
processes together. It decides everything; the model's directory must have the same path on every host.
"""

from __future__ import annotations

from absl import flags

from engine.errors import ConfigError
from experiments import common_flags

flags.declare_key_flag("coordinator")
flags.declare_key_flag("num_processes")
PROCESS_ID = flags.DEFINE_integer("process_id", 1, "Of this process, from 1.", lower_bound=1)


def main() -> int:
    """The program."""
    if not common_flags.COORDINATOR.value:
        raise ConfigError("--coordinator is missing: host:port of process 0")
    from engine.builder import follow
    from engine.executor import distributed

    distributed.start(common_flags.COORDINATOR.value, common_flags.num_processes(), PROCESS_ID.value)
    print(f"process {PROCESS_ID.value}: process 0 ended after {follow()} calls")
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
