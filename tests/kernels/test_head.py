"""Every loss head against plain float64 logits and cross entropy: values and gradients.

Triton runs compiled on a GPU and interpreted elsewhere. Where another test module has imported triton before the
interpreter could be chosen, its cases run in a process of their own (last test).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sft_kernels import HEADS, KernelUnavailableError, choose_head, head_plain, head_reference, head_triton, one_pass
from sft_kernels.one_pass import IGNORE_INDEX, one_pass_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_HERE = head_triton.unavailable_reason() is None
HERE = {name: head for name, head in HEADS.items() if name != "triton" or TRITON_HERE}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
each_head = pytest.mark.parametrize("head", [pytest.param(f, id=name) for name, f in HERE.items()])


@dataclass(frozen=True)
class Case:
    """One problem: T tokens of width D, vocabulary V, a share of them supervised."""

    tokens: int = 37
    width: int = 16
    vocabulary: int = 101
    share: float = 0.35
    bias: bool = False
    weighted: bool = False
    scale: float = 1.0
    softcap: float | None = None
    chunk_rows: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        return {"logit_scale": self.scale, "softcap": self.softcap}


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    loss_weights: Tensor
    bias: Tensor | None
    num_loss_tokens: int

    @property
    def trained(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]


def make(case: Case, device: str = DEVICE) -> Problem:
    g = torch.Generator().manual_seed(case.seed)
    hidden = torch.randn(case.tokens, case.width, generator=g).to(device, case.dtype).requires_grad_()
    weight = torch.randn(case.vocabulary, case.width, generator=g).div(2).to(device, case.dtype).requires_grad_()
    bias = torch.randn(case.vocabulary, generator=g).to(device, case.dtype).requires_grad_() if case.bias else None
    labels = torch.randint(case.vocabulary, (case.tokens,), generator=g)
    labels[torch.rand(case.tokens, generator=g) >= case.share] = IGNORE_INDEX
    weights = torch.rand(case.tokens, generator=g) + 0.1 if case.weighted else torch.ones(case.tokens)
    count = int((labels != IGNORE_INDEX).sum())
    return Problem(hidden, weight, labels.to(device), weights.to(device), bias, count)


def solve(head: Callable[..., Tensor], p: Problem, divisor: float = 7.0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Loss sum, and the gradients of `loss / divisor` for everything that requires them."""
    loss = head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens, bias=p.bias, **options)
    return loss.detach(), list(torch.autograd.grad(loss / divisor, p.trained)) if p.trained else []


def truth(p: Problem, divisor: float = 7.0, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The same in float64 with all logits."""
    wide = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    exact = replace_tensors(p, hidden=wide(p.hidden), weight=wide(p.weight), bias=wide(p.bias))
    return solve(head_plain.supervised_loss, exact, divisor, **options)


def replace_tensors(p: Problem, **tensors: Tensor | None) -> Problem:
    return replace(p, **tensors)


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; absolute where the expectation is zero."""
    scale = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (scale or 1.0)


def check(head: Callable[..., Tensor], case: Case, loss_limit: float = 1e-6, gradient_limit: float = 1e-5) -> None:
    p = make(case)
    loss, gradients = solve(head, p, chunk_rows=case.chunk_rows, **case.options)
    expected_loss, expected = truth(p, **case.options)
    assert difference(loss, expected_loss) < loss_limit
    for found, right, tensor in zip(gradients, expected, p.trained, strict=True):
        assert found.dtype == tensor.dtype
        assert difference(found, right) < gradient_limit


CASES = {
    "plain": Case(),
    "nothing_supervised": Case(share=0.0),
    "everything_supervised": Case(share=1.0),
    "one_row": Case(tokens=1, share=1.0),
    "one_of_many": Case(tokens=200, share=0.01, seed=3),
    "vocabulary_of_one": Case(vocabulary=1),
    "vocabulary_power_of_two": Case(vocabulary=128),
    "vocabulary_over_a_block": Case(vocabulary=5003, tokens=9, share=0.5),
    "width_one": Case(width=1),
    "weighted": Case(weighted=True),
    "bias": Case(bias=True),
    "scale": Case(scale=0.125),
    "softcap": Case(softcap=3.0),
    "everything_at_once": Case(bias=True, weighted=True, scale=1.75, softcap=2.0, chunk_rows=4, tokens=61),
    "chunks_of_one": Case(chunk_rows=1),
    "uneven_chunks": Case(chunk_rows=5, share=0.8),
    "large_logits": Case(scale=400.0),
}


@each_head
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_float64_logits(head, case):
    check(head, case)


@each_head
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_and_options(head, seed):
    g = torch.Generator().manual_seed(1000 + seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    chance = lambda: float(torch.rand(1, generator=g))  # noqa: E731
    case = Case(
        tokens=draw(1, 90), width=draw(1, 40), vocabulary=draw(2, 700), share=chance(), bias=chance() < 0.5,
        weighted=chance() < 0.5, scale=0.2 + chance(), softcap=1 + 30 * chance() if chance() < 0.5 else None,
        chunk_rows=draw(1, 20) if chance() < 0.5 else None, seed=seed,
    )  # fmt: skip
    check(head, case)


@each_head
def test_bf16_inputs_lose_only_their_rounding(head):
    check(head, Case(tokens=160, share=0.4, width=64, dtype=torch.bfloat16), 2e-3, 6e-3)


@each_head
def test_bf16_chunks_add_up_in_fp32(head, monkeypatch):
    """32 chunks give a weight gradient as good as one. Products in bf16 also on CPUs that only emulate it."""
    monkeypatch.setattr(one_pass, "_cpu_multiplies", lambda dtype: True)
    p = make(Case(tokens=64, share=1.0, dtype=torch.bfloat16))
    expected = truth(p)[1][1]
    whole, chunked = (difference(solve(head, p, chunk_rows=rows)[1][1], expected) for rows in (64, 2))
    assert 1e-4 < whole < 6e-3
    assert chunked < 1.2 * whole


def test_fp64_inputs_stay_fp64():
    p = make(Case(dtype=torch.float64, softcap=4.0, bias=True), "cpu")
    loss, gradients = solve(head_reference.supervised_loss, p, softcap=4.0)
    expected_loss, expected = truth(p, softcap=4.0)
    assert loss.dtype == torch.float64
    assert difference(loss, expected_loss) < 1e-14
    assert all(difference(a, b) < 1e-13 for a, b in zip(gradients, expected, strict=True))


@each_head
def test_chunked_equals_unchunked(head):
    p = make(Case(tokens=100, share=0.9))
    whole, whole_gradients = solve(head, p)
    pieces, piece_gradients = solve(head, p, chunk_rows=17)
    assert difference(pieces, whole) < 3e-7
    assert all(difference(a, b) < 1e-6 for a, b in zip(piece_gradients, whole_gradients, strict=True))


@each_head
def test_loss_is_fp32_and_scaled_by_the_incoming_gradient(head):
    p = make(Case())
    loss, once = solve(head, p, divisor=1.0)
    _, quarter = solve(head, p, divisor=4.0)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert all(torch.equal(a / 4, b) for a, b in zip(once, quarter, strict=True))


@each_head
def test_a_second_call_leaves_the_first_alone(head):
    first, second = make(Case(seed=1)), make(Case(seed=2))
    call = lambda p: head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens)  # noqa: E731
    pending, other = call(first), call(second)
    (other * 5).backward()
    pending.backward()
    alone = solve(head, replace_tensors(first), divisor=1.0)[1]
    assert torch.equal(first.hidden.grad, alone[0]) and torch.equal(first.weight.grad, alone[1])


@each_head
def test_gradients_of_several_calls_add_up(head):
    p = make(Case())
    for _ in range(3):
        head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens).backward()
    once = solve(head, p, divisor=1.0)[1]
    assert difference(p.weight.grad, 3 * once[1]) < 1e-6
    assert difference(p.hidden.grad, 3 * once[0]) < 1e-6


@each_head
def test_backward_runs_once_per_call(head):
    p = make(Case())
    loss = head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the head again"):
        loss.backward()


@each_head
def test_tied_weight_gets_both_gradients(head):
    """Hidden states made from the same matrix, as with tied embeddings."""
    p = make(Case(tokens=30))
    ids = torch.arange(30, device=DEVICE)
    tie = lambda w: replace_tensors(p, hidden=torch.tanh(w[ids]), weight=w)  # noqa: E731
    results = []
    for w, function in ((p.weight, head), (p.weight.detach().double().requires_grad_(), head_plain.supervised_loss)):
        q = tie(w)
        loss = function(q.hidden, q.weight, q.labels, q.loss_weights, num_loss_tokens=q.num_loss_tokens)
        results.append(torch.autograd.grad(loss, w)[0])
    assert difference(*results) < 1e-5


@each_head
@pytest.mark.parametrize(
    ("hidden", "weight", "factor"), [(True, True, 6), (True, False, 4), (False, True, 4), (False, False, 2)]
)
def test_computes_only_the_gradients_that_are_needed(head, hidden, weight, factor):
    """Multiply-adds per (supervised token, D, V): a frozen head makes no weight gradient."""
    case = Case(share=0.4)
    p = make(case)
    p.hidden.requires_grad_(hidden)
    p.weight.requires_grad_(weight)
    with FlopCounterMode(display=False) as counter:
        solve(head, p)
    assert counter.get_total_flops() == factor * p.num_loss_tokens * case.width * case.vocabulary
    assert difference(solve(head, p)[0], truth(p)[0]) < 1e-6


@each_head
def test_no_grad_computes_only_the_loss(head):
    case = Case(share=0.4)
    p = make(case)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens)
    assert counter.get_total_flops() == 2 * p.num_loss_tokens * case.width * case.vocabulary
    assert not loss.requires_grad
    assert difference(loss, truth(p)[0]) < 1e-6


@each_head
def test_no_supervised_token_still_reaches_every_parameter(head):
    """DDP and FSDP2 wait for every parameter's gradient, also in an empty micro-batch."""
    p = make(Case(share=0.0, bias=True))
    loss = head(p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=0, bias=p.bias)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not t.grad.any() for t in (p.hidden, p.weight, p.bias))


@each_head
def test_rows_without_label_do_not_matter(head):
    p = make(Case(share=0.3))
    clean = solve(head, p)[0]
    with torch.no_grad():
        p.hidden[p.labels == IGNORE_INDEX] = torch.nan
        p.loss_weights[p.labels == IGNORE_INDEX] = torch.nan
    loss, gradients = solve(head, p)
    assert torch.equal(loss, clean)
    assert all(g.isfinite().all() for g in gradients)


@each_head
def test_autocast_decides_the_products_not_the_sums(head):
    p = make(Case(tokens=64, width=32, share=0.5))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradients = solve(head, p)
    expected_loss, expected = truth(p)
    assert loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    assert difference(loss, expected_loss) < 1e-2
    assert all(difference(a, b) < 1e-2 for a, b in zip(gradients, expected, strict=True))


@each_head
def test_mixed_dtypes_use_the_wider_one(head):
    p = make(Case())
    narrow = p.hidden.detach().bfloat16().requires_grad_()
    mixed = replace_tensors(p, hidden=narrow)
    loss, gradients = solve(head, mixed)
    assert difference(loss, truth(mixed)[0]) < 1e-6
    assert gradients[0].dtype == torch.bfloat16 and gradients[1].dtype == torch.float32


def test_never_more_than_a_chunk_of_logits_and_only_supervised_rows():
    seen: list[int] = []

    def spy(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(len(logits))
        return head_reference.row_step(logits, *rest)

    p = make(Case(tokens=100, share=0.5))
    one_pass_loss(spy, p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens, chunk_rows=20)
    assert sum(seen) == p.num_loss_tokens
    assert max(seen) <= 20 and max(seen) - min(seen) <= 1 + len(seen)


@each_head
@pytest.mark.parametrize("error", [-1, 1])
def test_a_wrong_count_is_never_a_plausible_loss(head, error):
    p = make(Case())
    call = lambda: head(  # noqa: E731
        p.hidden, p.weight, p.labels, p.loss_weights, num_loss_tokens=p.num_loss_tokens + error
    )
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="labels are not -100"):
            call()
    else:
        assert call().isnan()


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.zeros(101, 15)},
        {"labels": torch.zeros(36, dtype=torch.long)},
        {"loss_weights": torch.ones(36)},
        {"num_loss_tokens": 38},
    ],
    ids=lambda change: next(iter(change)),
)
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(ValueError, match="must"):
        solve(head_reference.supervised_loss, replace(make(Case(), "cpu"), **change))


def test_the_choice_explains_itself():
    assert choose_head("auto", "cpu")[::2] == ("reference", "cpu device")
    assert choose_head("reference", "cuda")[0] == "reference"
    with pytest.raises(ValueError, match="'tritno' is unknown"):
        choose_head("tritno", "cpu")


def test_a_kernel_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(head_triton, "unavailable_reason", lambda: "no CUDA device")
    assert choose_head("auto", "cuda")[::2] == ("reference", "no CUDA device")
    with pytest.raises(KernelUnavailableError, match="head=triton: no CUDA device"):
        choose_head("triton", "cuda")


@pytest.mark.gpu
@needs_gpu
@each_head
@pytest.mark.parametrize("share", [0.35, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_sizes_on_a_gpu(head, share, dtype):
    """A 0.5B model's head: 151,936 tokens of vocabulary, several chunks at p = 1."""
    limits = (1e-4, 8e-3) if dtype == torch.bfloat16 else (1e-6, 2e-3)  # fp32 products may use TF32
    case = Case(
        tokens=2048, width=896, vocabulary=151_936, share=share, dtype=dtype, scale=0.05, weighted=True, chunk_rows=900
    )
    check(head, case, *limits)


@pytest.mark.gpu
@needs_gpu
@each_head
def test_no_device_synchronisation(head):
    p = make(Case(tokens=512, vocabulary=4096), "cuda")
    solve(head, p)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve(head, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if not TRITON_HERE and DEVICE == "cpu":

    def test_triton_in_a_process_of_its_own():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__]
        root = Path(__file__).parents[2]
        run = subprocess.run(
            command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
        assert "test_equals_float64_logits" not in run.stdout and " passed" in run.stdout
