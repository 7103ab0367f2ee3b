"""FLOPs by formula against torch's own counter, and packing leaves them alone."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from sft_dist.models.load import build_random
from sft_dist.observe.perf import Shape, peak_flops, step_flops
from sft_dist.parts import decoder_shape


def test_formula_equals_the_counter_on_one_document() -> None:
    model = build_random(tiny_config("llama"), dtype=torch.float32, seed=0)
    model.set_attn_implementation("eager")
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 128, (1, length)), use_cache=False).logits.sum().backward()
    shape = decoder_shape(model)
    # The counter sees full squares; required work is the causal half, counted by the formula's 6 instead of 12.
    # Nobody needs the gradient of the embedding's output, but the counter's backward makes it through every layer.
    attention = 6 * shape.num_layers * shape.attention_width * length**2
    assert counter.get_total_flops() == pytest.approx(
        step_flops(shape, length, length**2, length) + attention, rel=0.02
    )


def test_packing_leaves_the_flops_of_documents_alone() -> None:
    shape = Shape(1000, 2, 64, 32, 128, trains_all=True)
    lengths = [3, 50, 17]
    together = step_flops(shape, sum(lengths), sum(n * n for n in lengths), 30)
    assert together == sum(step_flops(shape, n, n * n, 10) for n in lengths)


def test_frozen_weights_cost_a_third_less() -> None:
    values = (1000, 2, 64, 32, 128)
    assert (
        step_flops(Shape(*values, trains_all=False), 10, 0, 5)
        == step_flops(Shape(*values, trains_all=True), 10, 0, 5) * 4 / 6
    )


def test_no_peak_is_claimed_for_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None
