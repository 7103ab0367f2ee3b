"""`sft-dist estimate RECIPE --gpus N`: memory by part, time, cost and strategy, before anything is built."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.errors import EXIT_DONE, ConfigError
from sft_dist.observe.header import count

if TYPE_CHECKING:
    from sft_dist.estimate.compare import Estimate

GIB = 2**30


def add_parser(subparsers: Any) -> None:
    """Add the verb `estimate`."""
    parser = subparsers.add_parser("estimate", help="memory, time and cost before a run", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices in all; with cpu: processes (1)")
    parser.add_argument("--gpu-type", metavar="T", help="H100, H200, A100 ..., or cpu (default: what is here)")
    parser.add_argument("--price", type=float, metavar="P", help="of one GPU for one hour, for the cost")
    parser.add_argument("--mfu", type=float, metavar="F", help="share of the peak FLOP/s to expect, such as 0.45")
    parser.add_argument("--json", action="store_true", help="one JSON value on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 whether or not the recipe fits: `fits` in the JSON tells."""
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: must be at least 1")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: must lie between 0 and 1")
    recipe = read_recipe(args.items)
    from sft_dist.estimate.compare import estimate
    from sft_dist.estimate.hardware import find_device

    found = estimate(recipe, find_device(args.gpu_type, args.gpus), args.gpus, args.mfu)
    print(json.dumps(as_json(found, args.price), indent=2) if args.json else describe(found, args.price))
    return EXIT_DONE


def as_json(found: Estimate, price: float | None) -> dict[str, Any]:
    """Bytes per rank, seconds per step over all ranks."""
    return {
        "model": {
            "type": found.architecture.model_type,
            "parameters": found.tuned.base,
            "trained": found.tuned.trained,
        },
        "device": {"name": found.device.name, "number": found.num_devices, "memory_bytes": found.device.memory},
        "choices": found.choices.as_dict(),
        "strategies": [
            {
                "strategy": option.strategy,
                "fits": option.fits,
                "peak_bytes": option.peak,
                "peak_phase": option.memory.phase,
                "phases": option.memory.device,
                "host_phases": option.memory.host,
                "step_seconds": option.step_seconds,
            }
            for option in found.options
        ],
        "fits": found.recommended is not None,
        "planned": found.choices.strategy,  # what the recipe as it is runs
        "recommended": found.recommended,
        "reason": found.reason,
        "remedies": [{"settings": text, "peak_bytes": peak} for text, peak in found.remedies],
        "data": found.work.note,
        "steps": found.work.num_steps,
        "step_tokens": found.work.step_tokens,
        "hours": hours(found),
        "cost": cost(found, price),
    }


def hours(found: Estimate) -> float | None:
    """Of the whole run with the recommended strategy; None while steps or strategy are unknown."""
    if found.recommended is None or found.work.num_steps is None:
        return None
    return found.work.num_steps * found.option(found.recommended).step_seconds / 3600


def cost(found: Estimate, price: float | None) -> float | None:
    spent = hours(found)
    return None if spent is None or price is None else spent * found.num_devices * price


def describe(found: Estimate, price: float | None) -> str:
    """The table and the advice, for a person."""
    a, t, d = found.architecture, found.tuned, found.device
    where = f"{found.num_devices} x {d.name}, {d.memory / GIB:.1f} GiB each"
    choices, recipe = found.choices, found.recipe
    micro = choices.packs_per_micro_batch * recipe.data.seq_len
    lines = [
        f"model        {a.model_type}, {count(t.base)} parameters, {count(t.trained)} trained "
        f"({recipe.tuning.method}), compute {choices.compute}, master {recipe.precision.master}",
        f"data         {found.work.note}",
        f"micro-batch  {micro:,} tokens, activation checkpointing {choices.activation_checkpointing}; "
        f"a step has {found.work.step_tokens:,} tokens",
        "",
        *_table(found),
        "",
        f"take         {found.recommended or 'nothing'}: {found.reason}",
    ]
    if found.recommended not in (None, choices.strategy):
        lines.append(
            f"             the recipe as it is runs {choices.strategy}: set parallel.strategy={found.recommended}"
        )
    lines += [f"would fit    {peak / GIB:7.1f} GiB  {text}" for text, peak in found.remedies]
    lines.append(_time(found, where, price))
    return "\n".join(lines)


def _table(found: Estimate) -> list[str]:
    """GiB per rank in the fullest phase of each strategy."""
    options = found.options
    names = list(dict.fromkeys(name for option in options for name in option.memory.parts))
    head = f"{f'GiB per rank, {found.num_devices} x {found.device.name}':<30}"
    rows = [head + "".join(f"{option.strategy:>9}" for option in options)]
    for name in names:
        rows.append(f"  {name:<28}" + "".join(f"{option.memory.parts.get(name, 0) / GIB:9.2f}" for option in options))
    rows.append(f"{'peak (libraries included)':<30}" + "".join(f"{option.peak / GIB:9.2f}" for option in options))
    rows.append(f"{'  in phase':<30}" + "".join(f"{option.memory.phase:>9}" for option in options))
    rows.append(f"{f'fits {found.device.memory / GIB:.0f} GiB':<30}" + "".join(f"{_yes(o.fits):>9}" for o in options))
    if any(option.memory.host for option in options):
        rows.append(f"{'host, save and export':<30}" + "".join(f"{o.memory.host_peak / GIB:9.2f}" for o in options))
    rows.append(f"{'seconds per step':<30}" + "".join(f"{option.step_seconds:9.3g}" for option in options))
    return rows


def _time(found: Estimate, where: str, price: float | None) -> str:
    spent, charged = hours(found), cost(found, price)
    if spent is None:
        unknown = (
            "nothing fits" if found.recommended is None else "the number of steps is unknown until data are prepared"
        )
        return f"time         unknown: {unknown}"
    told = f"{spent * 3600:.0f} s" if spent < 0.1 else f"{spent:.1f} h" if spent < 48 else f"{spent / 24:.1f} days"
    paid = "" if charged is None else f", cost {charged:,.2f} at {price:g} per GPU and hour"
    return f"time         {found.work.num_steps:,} steps, {told} on {where}{paid}"


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"
