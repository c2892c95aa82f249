"""vTensor's figures 3, 7 and 8: what counts as fitted, numbers by hand, and kernels that are wrong."""

import pytest

from experiments.figures.base import FITTED, PREDICTED, Band
from experiments.figures.vtensor import fig3, fig7, fig8, kernel_times, setting
from experiments.figures.vtensor.fig3 import Fig3
from experiments.figures.vtensor.fig7 import Fig7
from experiments.figures.vtensor.fig8 import Fig8
from experiments.figures.vtensor.kernel_times import LEFT_OUT, Timed
from experiments.figures.vtensor.setting import FA_NATIVE, FA_PAGED, FLEXINFER, VLLM


def by_name(result) -> dict:
    return {v.name: v for v in result.verdicts}


def missed(result) -> list[str]:
    return [v.name for v in result.verdicts if v.passed is False]


def test_times_by_hand():
    """FlexInfer: 17.4 us, KV at 0.777 of 2,039 GB/s or a chain of 5.49 ns a token; pairs at 0.628 of 312 TFLOP/s."""
    kv = 2 * 8 * 16384 * 4 * 128 * 2  # bytes of 8 rows
    assert setting.decode_us(FLEXINFER, 8, 16384, 4) == pytest.approx(17.4 + kv / (0.777 * 2039e3))
    assert setting.decode_us(FLEXINFER, 1, 16384, 4) == pytest.approx(17.4 + 16384 * 5.49e-3)
    flops = 3 * 4 * 32 * 128 * (100 * 200 + 100 * 101 / 2)
    assert setting.prefill_us(FLEXINFER, 3, 200, 100) == pytest.approx(17.4 + flops / (0.628 * 312e6))
    assert fig3.tflops(FLEXINFER, 8, 16384, 4) == pytest.approx(
        8 * kv / setting.decode_us(FLEXINFER, 8, 16384, 4) / 1e6
    )


def test_only_the_batch_sweep_is_fitted():
    """Its shapes are fitted wherever they come again; nothing is called predicted that was in the fit."""
    points = fig7.timed()
    assert len(points) == 4 * 3 * 4
    assert {(p.sweep, p.x) for p in points if p.kind == PREDICTED} == {
        *(("length", n) for n in (1024, 4096, 65536)),
        *(("kv_heads", n) for n in (1, 8, 32)),
    }
    assert [(p.kernels, p.sweep, p.x) for p in points if p.kind == LEFT_OUT] == [(FA_PAGED, "batch", 1)]
    of = {(p.kernels, p.sweep, p.x): p.kind for p in fig8.timed()}
    assert len(of) == 4 * 7
    assert [of[VLLM, "batch", n] for n in (1, 4, 8, 16)] == [PREDICTED, PREDICTED, FITTED, PREDICTED]
    assert [of[VLLM, "prefix_ratio", s] for s in (0.25, 0.5, 0.75)] == [FITTED, FITTED, PREDICTED]
    for kernels in (FLEXINFER, FA_NATIVE, FA_PAGED):
        assert {of[kernels, "batch", n] for n in (1, 4, 8, 16)} == {FITTED}
        assert [of[kernels, "prefix_ratio", s] for s in (0.25, 0.5, 0.75)] == [PREDICTED, FITTED, PREDICTED]


def test_verdicts_on_times_made_by_hand():
    """1.1 and 0.9 of the paper's time within 10%, 1.2 not; what was left out of the fit is not judged."""

    def point(x, kind, ours):
        return Timed("batch", x, VLLM, kind, ours, 100.0)

    good = [point(1, FITTED, 110.0), point(2, PREDICTED, 90.0), point(3, LEFT_OUT, 500.0)]
    fitted, predicted = kernel_times.verdicts(good, {VLLM: 0.1}, {})
    assert (fitted.kind, fitted.passed, predicted.kind, predicted.passed) == (FITTED, True, PREDICTED, True)
    fitted, predicted = kernel_times.verdicts([*good, point(4, PREDICTED, 120.0)], {VLLM: 0.1}, {VLLM: "because"})
    assert fitted.passed and predicted.passed is False
    assert predicted.reached == "0.9 (batch 2) to 1.2x (batch 4); outside at batch 4" and predicted.why == "because"
    fitted, predicted = kernel_times.verdicts(good[:1], {VLLM: 0.1}, {})
    assert predicted.passed is None
    assert kernel_times.table(good).rows[0] == ["batch", 1, "vLLM 0.4.2", FITTED, 110.0, 100.0, 1.1]


def test_figure_7_as_committed():
    result = Fig7().evaluate({}, "sim")
    assert missed(result) == ["FlashAttention, contiguous: predicted times over the paper's"]
    assert by_name(result)[missed(result)[0]].reached.endswith("outside at kv_heads 32")
    assert sum(v.counts for v in result.verdicts) == 4


def test_figure_8_as_committed():
    result = Fig8().evaluate({}, "sim")
    assert missed(result) == []
    gain = by_name(result)["Triton over FlexInfer, over the paper's"]
    assert gain.counts and "cached share 0.75" in gain.reached and "0.25" not in gain.reached


@pytest.mark.parametrize("figure, name", [(Fig7(), "decode_us"), (Fig8(), "prefill_us")])
def test_a_slower_kernel_is_seen(monkeypatch, figure, name):
    """One kernel at 1.4 times its time: its own verdicts turn red, the others' stay."""
    module = {"decode_us": fig7, "prefill_us": fig8}[name]
    before, right = by_name(figure.evaluate({}, "sim")), getattr(module, name)
    monkeypatch.setattr(module, name, lambda kernels, *a: right(kernels, *a) * (1.4 if kernels == VLLM else 1.0))
    after = by_name(figure.evaluate({}, "sim"))
    assert not any(v.passed for n, v in after.items() if n.startswith("vLLM"))
    assert all(v == before[n] for n, v in after.items() if n.startswith("Flex"))


def test_figure_3_as_committed():
    """The length is picked by one point; one and two sequences of vLLM are missed, and it says so."""
    result = Fig3().evaluate({}, "sim")
    found = by_name(result)
    assert result.notes[0] == "sequences of 2,048 tokens"
    fitted = [v for v in result.verdicts if v.kind == FITTED]
    assert len(fitted) == 1 and "4 KV heads" in fitted[0].reached
    assert missed(result) == [f"vLLM, batch {n}: TFLOP/s over the paper's" for n in (2, 1)]
    assert found["FlexInfer over vLLM at MQA, batch 32"].counts and found["FlexInfer over vLLM at MQA, batch 32"].passed
    assert len(result.table.rows) == 36


def test_the_length_is_that_of_the_nearest(monkeypatch):
    """Points made at 4,096 tokens pick 4,096, and then all of them are met; a flat kernel has no MQA ratio."""
    made = [
        fig3.Place(k, b, kv, tuple(fig3.tflops(k, b, n, kv) for n in fig3.LENGTHS), fig3.tflops(k, b, 4096, kv))
        for k, b in fig3.STYLES
        for kv in fig3.KV_HEADS
    ]
    assert fig3.LENGTHS[fig3.picked(made)] == 4096
    assert all(v.passed for v in fig3.verdicts(made, 2) if "MQA" not in v.name)
    flat = [fig3.Place(p.kernels, p.batch, p.kv_heads, (3.0,) * 3, p.paper) for p in made]
    assert fig3.verdicts(flat, 2)[-1].passed is False and Band(6.08, 9.12).words() in fig3.verdicts(flat, 2)[-1].limit


@pytest.mark.parametrize("figure", [Fig3(), Fig7(), Fig8()])
def test_it_is_drawn(figure, tmp_path):
    pytest.importorskip("matplotlib")
    figure.draw(figure.evaluate({}, "sim"), tmp_path / "figure")
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and (tmp_path / "figure.pdf").exists()
