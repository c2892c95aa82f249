"""A cost model whose seconds can be worked out by hand: binary fractions, so that sums are exact."""

import numpy as np

from engine.costmodel.stages import Stage
from engine.costmodel.step_model import StepTime, StepWork


class FlatCost:
    """A step takes `base`, `row` for each decode row, `kv` for each token that decode rows attend to, and `token` for
    each prompt token; the host takes `host` before each. In each layer all-reduces hold the link to the host for
    `collective` of that time and no less. As one of the stages of a pipeline it has `layers`, and sends
    to the next one take `send`."""

    def __init__(
        self, base=1 / 64, row=1 / 1024, kv=1 / 2**20, token=1 / 4096, host=0.0, layers=range(2), send=1 / 512,
        collective=0.0,
    ):  # fmt: skip
        self.base, self.row, self.kv, self.token, self.host, self.send = base, row, kv, token, host, send
        self.collective, self.shares_host_link = collective, collective > 0
        self.stage = Stage(layers, first=True, last=True)

    def page_copy_seconds(self, num_bytes: int) -> float:
        return num_bytes / 4096

    def send_seconds(self, tokens: int) -> float:
        return self.send

    def step(self, work: StepWork) -> StepTime:
        tokens = sum(n for _, n in work.prefills)
        seconds = self.base + self.row * work.num_decode + self.kv * work.decode_kv + self.token * tokens
        num = len(self.stage.layers)
        layer, held = seconds / num + self.collective, self.collective
        return StepTime(host=self.host, embed=0.0, layer=layer, collective=held, tail=0.0, num_layers=num)

    def decode_seconds(self, num: int, kv: int, max_kv: int, repeat: int) -> np.ndarray:
        return np.array([self.step(StepWork(num, kv + num * i, max_kv + i, (), num)).device for i in range(repeat)])
