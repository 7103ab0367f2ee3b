"""`sft-dist data prepare | inspect | stats | plan`: the training data, seen before it is trained on."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.cli.progress import shown_progress, tell
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DONE, ConfigError, StorageError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

    from sft_dist.config.auto import Choices
    from sft_dist.data.inspect import PackView
    from sft_dist.data.prepare import PreparedData
    from sft_dist.data.stream_store import AnyStore

_EXAMPLES_AFTER_PREPARE = 3
_WORLD_SIZES = (1, 2, 4, 8, 64, 1024)


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
    inspect.add_argument("--source", metavar="TEXT", help="rows of files with this in their name")
    inspect.add_argument("--grep", metavar="TEXT", help="rows with this in their text, case aside")
    inspect.add_argument("--longest", action="store_true", help="the longest rows")
    inspect.add_argument("--step", type=int, metavar="N", help="the packs of this planned optimizer step")
    inspect.add_argument("--pack", metavar="STEP:MICRO:PACK", help="the documents of one pack, counted as --step does")
    for name in ("inspect", "stats"):
        parsers[name].add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    for name in ("inspect", "plan"):
        parsers[name].add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (default 1)")


def prepare_them(args: argparse.Namespace) -> int:
    """Fill the cache and say what became of every source."""
    from sft_dist.cli.data_views import show_examples, views_of
    from sft_dist.data.inspect import sample_rows

    recipe, tokenizer, data = _prepared(args)
    if args.json:
        print(json.dumps({"folder": str(data.folder), **data.report_now().shown()}, indent=2, ensure_ascii=False))
        return EXIT_DONE
    console = _console()
    for line in data.report_now().lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    rows = sample_rows(len(data.train), _EXAMPLES_AFTER_PREPARE, recipe.run.seed)
    show_examples(console, views_of(data.train, rows, tokenizer))
    console.print(f"store: {data.folder}", markup=False, highlight=False, soft_wrap=True)
    return EXIT_DONE


def inspect_them(args: argparse.Namespace) -> int:
    """Show chosen rows, a seeded sample, or what shares the packs of a planned step."""
    from sft_dist.cli.data_views import show_examples, show_packs, views_of

    recipe, tokenizer, data = _prepared(args)
    _tell_all(data.report.told())
    store = getattr(data, args.split)
    if store is None:
        raise ConfigError(f"--split {args.split}: this recipe has no such split; raise data.{args.split}_fraction")
    packs = _asked_packs(args, recipe, store)
    rows = [row for pack in packs for row in pack.rows] if packs else _asked_rows(args, recipe, store, tokenizer)
    listed = [] if args.step is not None and not args.html else rows
    views = views_of(store, listed, tokenizer)
    if args.json:
        shown = {"packs": [pack.as_dict() for pack in packs], "examples": [view.as_dict() for view in views]}
        print(json.dumps(shown if packs else shown["examples"], indent=2, ensure_ascii=False))
    elif args.html:
        from sft_dist.data.inspect import html_page

        _write(args.html, html_page(views, f"{recipe.run.name}: {args.split}", packs))
    else:
        show_packs(_console(), packs)
        if views:
            show_examples(_console(), views)
    return EXIT_DONE


def count_them(args: argparse.Namespace) -> int:
    """Print the preparation's report and a survey of its rows, or write them as a page."""
    from sft_dist.cli.data_stats import as_json, show_report, show_survey
    from sft_dist.data.survey import survey

    recipe, tokenizer, data = _prepared(args)
    if data.indexed is None:
        raise ConfigError(
            "data.sources are streamed, and this looks at all rows: set streaming=false and name one file of them; "
            "`data prepare` counts what was read so far"
        )
    stores = {name: getattr(data, name) for name in data.report.splits}
    with shown_progress("looking", "rows") as progress:
        found = survey(stores, data.template, tokenizer, seed=recipe.run.seed, progress=progress)
    if args.json:
        print(as_json(data.report, found))
    elif args.html:
        from sft_dist.observe.data_page import render

        _write(args.html, render(recipe.run.name, data.report.shown(), found.as_dict()))
    else:
        show_report(_console(), data.report)
        show_survey(_console(), found)
    return EXIT_DONE


def plan_them(args: argparse.Namespace) -> int:
    """Build the plan a run would follow and measure it."""
    from sft_dist.data.planning import train_plan

    recipe, _, data = _prepared(args)
    _tell_all(data.report.told())
    if data.indexed is None:
        raise ConfigError(
            "data.sources are streamed and planned as they are read: `data inspect --step N` shows a step, and the "
            "report of a run all of them"
        )
    asked = 1 if args.world_size is None else args.world_size
    if asked < 1:
        raise ConfigError(f"--world-size {asked}: must be 1 or more")
    choices = _choices(recipe, data.indexed, asked)
    plan = train_plan(recipe, choices, data.indexed)
    tokens_per_step = data.indexed.num_tokens / plan.steps_per_epoch
    figures = {
        "steps": plan.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "examples": plan.num_examples,
        "packs_per_epoch": plan.num_packs,
        "packs_by_epoch": [plan.packs_in_epoch(epoch) for epoch in range(plan.num_epochs)],
        "packs_per_micro_batch": choices.packs_per_micro_batch,
        "micro_batches_per_step": choices.micro_batches_per_step,
        "examples_per_step": recipe.batch.examples_per_step,
        "mean_tokens_per_step": round(tokens_per_step, 1),
        "tokens_per_epoch": plan.num_tokens,
        "padding_per_epoch": plan.num_slots - plan.num_tokens,
        "efficiency": plan.efficiency,
        "measured_share": plan.measured_share,
        "balance": {str(size): plan.balance(size) for size in sorted({*_WORLD_SIZES, asked})},
        "digest": plan.digest,
    }
    if args.json:
        print(json.dumps(figures, indent=2))
        return EXIT_DONE
    _console().print(_plan_table(figures, recipe))
    return EXIT_DONE


def _prepared(args: argparse.Namespace) -> tuple[Recipe, PreTrainedTokenizerFast, PreparedData]:
    """Recipe, tokenizer and data. Progress and notices go to stderr, so that stdout is the answer alone; the report is
    the caller's to show. Ids that the model has no rows for are refused as training would, from its config alone."""
    from sft_dist.data.prepare import prepare
    from sft_dist.models.load import load_config, load_tokenizer
    from sft_dist.models.vocabulary import check_rows, num_added

    recipe = read_recipe(args.items)
    tokenizer = load_tokenizer(recipe.model)
    check_rows(load_config(recipe.model).get_text_config().vocab_size, len(tokenizer), num_added(tokenizer))
    with shown_progress("preparing", "bytes") as progress:
        data = prepare(
            recipe,
            tokenizer,
            notice=tell,
            progress=progress,
            streaming=progress.stream,
            alive=progress.stay,
            counts=lambda line: None,
        )
    return recipe, tokenizer, data


def _tell_all(lines: Iterable[str]) -> None:
    for line in lines:
        tell(line)


def _choices(recipe: Recipe, store: AnyStore, world_size: int) -> Choices:
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


def _asked_rows(
    args: argparse.Namespace, recipe: Recipe, store: AnyStore, tokenizer: PreTrainedTokenizerFast
) -> list[int]:
    """The rows of `--row`; else of those that `--source` and `--grep` leave the longest, the first or a sample."""
    import numpy as np

    from sft_dist.data.inspect import find_rows, sample_rows

    for row in args.row or []:
        if not 0 <= row < len(store):
            raise ConfigError(f"--row {row}: the {args.split} split has rows 0 to {len(store) - 1}")
    if args.row:
        return list(args.row)
    if args.source is None and args.grep is None:
        longest = np.argsort(-np.asarray(store.lengths), kind="stable")[: args.n].tolist() if args.longest else None
        return longest or sample_rows(len(store), args.n, recipe.run.seed)
    found = find_rows(store, tokenizer, source=args.source, grep=args.grep)
    rows = sorted(found, key=lambda row: -store.lengths[row])[: args.n] if args.longest else list(islice(found, args.n))
    if not rows:
        asked = {"--source": args.source, "--grep": args.grep}
        options = " ".join(f"{name} {text!r}" for name, text in asked.items() if text is not None)
        raise ConfigError(f"{options}: no row of the {args.split} split fits; `data stats` lists its files")
    return rows


def _asked_packs(args: argparse.Namespace, recipe: Recipe, store: AnyStore) -> list[PackView]:
    """The packs of `--step` or `--pack`, of the plan as `data plan` makes it."""
    if args.step is None and args.pack is None:
        return []
    if args.split != "train":
        raise ConfigError(f"--split {args.split}: only train is planned in steps; leave out --step and --pack")
    from sft_dist.data.inspect import view_packs
    from sft_dist.data.planning import train_plan

    step, *place = _pack_place(args)
    plan = train_plan(recipe, _choices(recipe, store, args.world_size or 1), store)
    if not 1 <= step <= plan.num_steps:
        raise ConfigError(f"step {step}: this run has steps 1 to {plan.num_steps:,}")
    packs = view_packs(plan.step(step), store.lengths, recipe.data.seq_len)
    chosen = [pack for pack in packs if place in ([], [pack.micro_batch, pack.number])]
    if not chosen:
        raise ConfigError(f"--pack {args.pack}: step {step} has packs {packs[0].name} to {packs[-1].name}")
    return chosen


def _pack_place(args: argparse.Namespace) -> list[int]:
    """[step], or [step, micro-batch, pack]."""
    if args.pack is None:
        return [args.step]
    if args.step is not None:
        raise ConfigError(f"--step {args.step}: --pack {args.pack} names its step already; give one of them")
    parts = args.pack.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--pack {args.pack}: must be STEP:MICRO:PACK, three numbers, as in --pack 3:0:1")
    return [int(part) for part in parts]


def _write(path: Path, page: str) -> None:
    """Write a page and say where. Raises StorageError when it cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--html {path}: cannot be written ({error.strerror}); name another file") from error
    print(path)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _plan_table(figures: dict[str, Any], recipe: Recipe) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, title=f"plan of {recipe.run.name}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    per_step = figures["micro_batches_per_step"]
    fewest, most = min(figures["packs_by_epoch"]), max(figures["packs_by_epoch"])
    packs = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    measured = figures["measured_share"]
    estimate = f"; estimated from {measured:.1%} of the steps" if measured < 1 else ""
    batch = f"micro-batches: {per_step}" if per_step else f"examples: {figures['examples_per_step']}, in micro-batches"
    rows = {
        "steps": f"{figures['steps']:,} ({figures['steps_per_epoch']:,} per epoch)",
        "a step": f"{batch} of {figures['packs_per_micro_batch']} x {recipe.data.seq_len} tokens; "
        f"{figures['mean_tokens_per_step']:,.0f} real tokens on average",
        "an epoch": f"{figures['examples']:,} examples, {figures['tokens_per_epoch']:,} tokens in {packs} packs",
        "efficiency": f"{figures['efficiency']:.2%} of the token slots hold tokens, "
        f"{figures['padding_per_epoch']:,} are padding" + (estimate if recipe.data.packing == "padded" else ""),
        "balance": ", ".join(f"{share:.1%} on {int(size):,}" for size, share in figures["balance"].items())
        + f" ranks (mean work over the slowest rank's{estimate})",
        "digest": figures["digest"][:16] + " (its first 16 of 64 digits)",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    return table
