"""LayerKV, wrong in one way each: what a figure must notice."""

from engine.scheduler.layerkv.policy import LayerKV


class Inverted:
    """An admission rule that lets prompts pass exactly when the true one holds them back."""

    def __init__(self, rule):
        self.rule, self.admitted = rule, rule.admitted

    def allows(self, waiting):
        """The opposite."""
        return not self.rule.allows(waiting)


class InvertedRule(LayerKV):
    """Prompts wait while running requests could wait for them, and come when they cannot."""

    def __init__(self, config, state, max_batched_tokens):
        super().__init__(config, state, max_batched_tokens)
        rule = self.foresight.rule
        # When nobody runs there is nobody to weigh: the rule is the true one.
        self.foresight.rule = lambda now, slots, **rest: (
            Inverted(rule(now, slots, **rest)) if len(slots) else rule(now, slots, **rest)
        )


class NeverHome(LayerKV):
    """What has left the device is streamed or waits, and never comes back."""

    def __init__(self, config, state, max_batched_tokens):
        super().__init__(config, state, max_batched_tokens)
        self.residency.come_home = lambda *asked: 0
