"""`sft-dist data prepare | inspect | stats | plan`: the training data, seen before it is trained on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.cli.progress import bar
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

    from sft_dist.config.auto import Choices
    from sft_dist.data.inspect import ExampleView
    from sft_dist.data.prepare import PreparedData
    from sft_dist.data.report import PrepareReport
    from sft_dist.data.store import TokenStore

_EXAMPLES_AFTER_PREPARE = 3
_MAX_LISTED = 20
_WORLD_SIZES = (1, 2, 4, 8)


def add_parser(subparsers: Any) -> None:
    """Add the verb `data` with its four actions."""
    verb = subparsers.add_parser("data", help="prepare, inspect, count and plan training data", description=__doc__)
    actions = verb.add_subparsers(required=True, metavar="ACTION")
    table: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
        "prepare": (prepare_them, "tokenise into the store, and show three examples"),
        "inspect": (inspect_them, "show examples with the loss mask in colour"),
        "stats": (count_them, "lengths, supervised share, what was dropped and why"),
        "plan": (plan_them, "optimizer steps, packing efficiency, balance over ranks"),
    }
    parsers = {}
    for name, (func, text) in table.items():
        parsers[name] = actions.add_parser(name, help=text, description=text)
        add_recipe_arguments(parsers[name])
        parsers[name].add_argument("--json", action="store_true", help="one JSON value on stdout")
        parsers[name].set_defaults(func=func)
    inspect = parsers["inspect"]
    inspect.add_argument("-n", type=int, default=3, metavar="N", help="how many examples (default 3)")
    inspect.add_argument("--row", type=int, action="append", metavar="I", help="this row; may be given again")
    inspect.add_argument("--split", choices=["train", "eval", "test"], default="train")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    parsers["plan"].add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (default 1)")


def prepare_them(args: argparse.Namespace) -> int:
    """Fill the cache and say what became of every source."""
    recipe, tokenizer, data = _prepared(args)
    if args.json:
        print(json.dumps({"folder": str(data.folder), **data.report.as_dict()}, indent=2, ensure_ascii=False))
        return EXIT_DONE
    console = _console()
    for line in data.report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = _sample(len(data.train), _EXAMPLES_AFTER_PREPARE, recipe.run.seed)
    _show(console, _views(data.train, rows, tokenizer))
    console.print(f"store: {data.folder}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def inspect_them(args: argparse.Namespace) -> int:
    """Show chosen rows, or a seeded sample."""
    recipe, tokenizer, data = _prepared(args)
    store = getattr(data, args.split)
    if store is None:
        raise ConfigError(f"--split {args.split}: this recipe has no such split; raise data.{args.split}_fraction")
    rows = args.row or _sample(len(store), args.n, recipe.run.seed)
    for row in rows:
        if not 0 <= row < len(store):
            raise ConfigError(f"--row {row}: the {args.split} split has rows 0 to {len(store) - 1}")
    views = _views(store, rows, tokenizer)
    if args.json:
        print(json.dumps([view.as_dict() for view in views], indent=2, ensure_ascii=False))
    elif args.html:
        from sft_dist.data.inspect import html_page

        args.html.write_text(html_page(views, f"{recipe.run.name}: {args.split}"), encoding="utf-8")
        print(args.html)
    else:
        _show(_console(), views)
    return EXIT_DONE


def count_them(args: argparse.Namespace) -> int:
    """Print the preparation's report as tables."""
    data = _prepared(args)[2]
    if args.json:
        print(json.dumps(data.report.as_dict(), indent=2, ensure_ascii=False))
        return EXIT_DONE
    console = _console()
    for source in data.report.sources:
        line = f"{source.describe()}, {source.supervised_share:.1%} supervised"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_split_table(data.report))
    for name, split in data.report.splits.items():
        console.print(f"\nlengths of {name}, in tokens", style="bold")
        for line in _bars(split.histogram):
            console.print(line, markup=False, highlight=False)
    for title, lines in (("bad records", _rejects(data.report)), ("dropped", _dropped(data.report))):
        _list(console, title, lines)
    _list(console, "notices", data.report.notices)
    return EXIT_DONE


def plan_them(args: argparse.Namespace) -> int:
    """Build the plan a run would follow and measure it."""
    from sft_dist.parts import train_plan

    recipe, _, data = _prepared(args)
    asked = args.world_size or 1
    choices = _choices(recipe, data.train, asked)
    plan = train_plan(recipe, choices, data.train)
    tokens_per_step = data.train.num_tokens / plan.steps_per_epoch
    figures = {
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "examples": plan.num_examples,
        "packs_per_epoch": plan.num_packs,
        "packs_per_micro_batch": choices.packs_per_micro_batch,
        "micro_batches_per_step": choices.micro_batches_per_step,
        "examples_per_step": recipe.batch.examples_per_step,
        "mean_tokens_per_step": round(tokens_per_step, 1),
        "efficiency": plan.efficiency,
        "balance": {str(size): plan.balance(size) for size in sorted({*_WORLD_SIZES, asked})},
        "digest": plan.digest,
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return EXIT_DONE
    _console().print(_plan_table(figures, recipe))
    return EXIT_DONE


def _prepared(args: argparse.Namespace) -> tuple[Recipe, PreTrainedTokenizerFast, PreparedData]:
    """Recipe, tokenizer and data; progress goes to stderr, so that stdout is the answer alone."""
    from sft_dist.data.prepare import prepare
    from sft_dist.models.load import load_tokenizer

    recipe = read_recipe(args.items)
    tokenizer = load_tokenizer(recipe.model)
    with bar("preparing", "bytes") as progress:
        return recipe, tokenizer, prepare(recipe, tokenizer, notice=lambda text: None, progress=progress)


def _choices(recipe: Recipe, store: TokenStore, world_size: int) -> Choices:
    """What `auto` becomes for a new run on this machine, from the architecture alone: no weights are read."""
    import torch
    from transformers import AutoModelForCausalLM

    from sft_dist.config.auto import Facts, choose
    from sft_dist.models.load import load_config

    config = load_config(recipe.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    text = config.get_text_config()
    on_gpu = torch.cuda.is_available()
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = Facts(
        num_parameters=num_parameters,
        num_trained=num_parameters,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_train_tokens=store.num_tokens,
        num_train_examples=len(store),
        world_size=world_size,
        device="cuda" if on_gpu else "cpu",
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_bytes // world_size,
    )
    return choose(recipe, facts)


def _sample(num_rows: int, n: int, seed: int) -> list[int]:
    """`n` different rows, the same for the same seed."""
    import numpy as np

    from sft_dist.data.permutation import derive_key, permute

    return permute(np.arange(min(n, num_rows)), num_rows, derive_key("inspect", seed)).tolist()


def _views(store: TokenStore, rows: list[int], tokenizer: PreTrainedTokenizerFast) -> list[ExampleView]:
    from sft_dist.data.inspect import view_example

    return [view_example(store.example(row), row=row, tokenizer=tokenizer) for row in rows]


def _console() -> Console:
    from rich.console import Console

    return Console()


def _show(console: Console, views: list[ExampleView]) -> None:
    """Each example between rules: its tokens in colour, then what is learned as text."""
    from rich.text import Text

    from sft_dist.data.inspect import terminal_text

    for view in views:
        share = f"{view.num_tokens} tokens, {view.num_loss_tokens} learned"
        console.rule(Text(f"row {view.row} · {view.id} · {share}"), align="left", style="dim")
        console.print(terminal_text(view), soft_wrap=True)
        for text in view.learned:
            console.print(Text.assemble(("\nlearned  ", "bold green"), repr(text)), soft_wrap=True)
    console.rule(style="dim")


def _split_table(report: PrepareReport) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE, title=f"\nrendered with {report.template}, data.seq_len={report.seq_len}", title_justify="left"
    )
    table.add_column("split")
    for name in ("examples", "tokens", "supervised", "min", "mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name, split in report.splits.items():
        lengths = [f"{split.lengths[key]:,.0f}" for key in ("min", "mean", "p50", "p90", "p99", "max")]
        table.add_row(name, f"{split.examples:,}", f"{split.tokens:,}", f"{split.supervised_share:.1%}", *lengths)
    return table


def _bars(histogram: dict[str, list[int]], width: int = 50) -> list[str]:
    """One line per bin from the first to the last used one, drawn with eighths of a block."""
    edges, counts = histogram["edges"], histogram["counts"]
    used = [number for number, count in enumerate(counts) if count]
    lines = []
    for number in range(used[0], used[-1] + 1):
        eighths = round(8 * width * counts[number] / max(counts))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        lines.append(f"{edges[number]:>7,} to {edges[number + 1] - 1:>7,} {counts[number]:>9,}  {bar}".rstrip())
    return lines


def _plan_table(figures: dict[str, Any], recipe: Recipe) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, title=f"plan of {recipe.run.name}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    per_step = figures["micro_batches_per_step"]
    batch = f"micro-batches: {per_step}" if per_step else f"examples: {figures['examples_per_step']}, in micro-batches"
    rows = {
        "steps": f"{figures['steps']:,} ({figures['steps_per_epoch']:,} per epoch)",
        "a step": f"{batch} of {figures['packs_per_micro_batch']} x {recipe.data.seq_len} tokens; "
        f"{figures['mean_tokens_per_step']:,.0f} real tokens on average",
        "an epoch": f"{figures['examples']:,} examples in {figures['packs_per_epoch']:,} packs",
        "efficiency": f"{figures['efficiency']:.2%} of the token slots hold tokens",
        "balance": ", ".join(f"{share:.1%} on {size}" for size, share in figures["balance"].items())
        + " ranks (mean work over the slowest rank's)",
        "digest": figures["digest"][:16] + " (its first 16 of 64 digits)",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _rejects(report: PrepareReport) -> list[str]:
    return [f"{bad['file']}:{bad['line']} (byte {bad['byte']}): {bad['reason']}" for bad in report.rejects]


def _dropped(report: PrepareReport) -> list[str]:
    return [f"{row['id']}: {row['reason']}" for row in report.dropped]


def _list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    console.print(f"\n{title}", style="bold")
    for line in lines[:_MAX_LISTED]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > _MAX_LISTED:
        console.print(f"  ... and {len(lines) - _MAX_LISTED:,} more (--json lists all)", highlight=False)
