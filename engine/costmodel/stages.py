"""Pipeline stages: neighbouring layers of a model on devices of their own."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from engine.config import ModelConfig
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage holds of a model."""

    layers: range
    first: bool  # has the embedding
    last: bool  # has the final norm and the LM head

    @staticmethod
    def split(model: ModelConfig, num_stages: int) -> tuple[Stage, ...]:
        """Stages of as many layers each as can be; the earlier ones have one more.

        Raises:
          ConfigError: more stages than layers.
        """
        if num_stages > model.num_layers:
            raise ConfigError(f"pipeline={num_stages} stages for the {model.num_layers} layers of {model.name}")
        size, more = divmod(model.num_layers, num_stages)
        starts = [i * size + min(i, more) for i in range(num_stages + 1)]
        ranges = [range(start, end) for start, end in pairwise(starts)]
        return tuple(Stage(layers, i == 0, i == num_stages - 1) for i, layers in enumerate(ranges))

    def part_of(self, model: ModelConfig) -> ModelConfig:
        """The model with the layers of this stage only."""
        windows = model.windows[self.layers.start : self.layers.stop]
        return model.replace(num_layers=len(self.layers), windows=windows)
