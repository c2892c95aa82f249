"""The other side of `peer_transformers`: starts it and hands it batches."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from experiments import peer_transformers
from experiments.measure import Timing, timing


class Peer:
    """`transformers` in its own process.

    Raises:
      ConfigError: it cannot run there; says how to install it.
    """

    def __init__(self, python: str, model: Path, dtype: str):
        command = [python, peer_transformers.__file__, str(model), dtype]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.about = self._reply()
        except BaseException:
            self.close()
            raise

    def __call__(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """A `Side`."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        reply = self._reply()
        counts = [len(prompts) * (i + 1) for i in range(len(reply["times"]))]
        return timing(reply["times"], counts, reply["tokens"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply = json.loads(line) if line else {"error": "the transformers process ended; its message is above"}
        if "error" in reply:
            raise ConfigError(reply["error"])
        return reply
