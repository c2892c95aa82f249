"""A figure from outside the tree: what parking layers does to a queue.

python -m experiments.reproduce --figure=tests/experiments/figures/example_figure.py:Queue --seeds=3
"""

from experiments.figures.base import PREDICTED, Band, Estimate, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, STYLES, VLLM
from experiments.plots import figure
from experiments.seeded import lower_by, mean, throughput_ratio, violations

RATES, POLICIES = (0.5, 1.0, 1.5), (VLLM, LAYERKV)  # requests/s: at the last one prompts queue for memory


class Queue(Figure):
    """`reproduce` runs its points, writes its table and judges its verdicts."""

    title = "Mean TTFT over the arrival rate"
    source = "An example"
    about = "Llama2-7B on one L20: 32 requests of 2,048 tokens, 450 output tokens each."

    def points(self, executor):
        """By rate and policy."""
        return {(rate, p): LLAMA2_7B.fixed(p, 2048, rate, num=32) for rate in RATES for p in POLICIES}

    def evaluate(self, cells, executor):
        """Claims about the last rate; `cells` has a value per seed by the keys of `points`."""
        ours, first = cells[RATES[-1], LAYERKV], cells[RATES[-1], VLLM]
        more, speed = violations(ours) - violations(first), throughput_ratio(ours, first)
        verdicts = [
            Verdict.within("TTFT, times lower", PREDICTED, Band(2), Estimate(*lower_by(ours, first)), "x"),
            Verdict.within("tok/s over vLLM's", PREDICTED, Band(0.95), speed),
            Verdict.within("violations beyond vLLM's", PREDICTED, Band(high=0), more),
        ]
        rows = [[*key, mean(cell, "mean_ttft_ms")] for key, cell in cells.items()]
        return Result(Table(("rate", "policy", "ttft ms"), rows), verdicts)

    def draw(self, result, stem):
        """A line per policy."""
        with figure(stem, 2.2) as axes:
            for policy in POLICIES:
                axes.plot(RATES, result.table.column("ttft ms", policy=policy), **STYLES[policy], label=policy)
            axes.set(xlabel="requests/s", ylabel="mean TTFT (ms)", yscale="log")
            axes.legend(frameon=False)
