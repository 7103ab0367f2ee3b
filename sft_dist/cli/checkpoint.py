"""`sft-dist checkpoint ls | verify | export RUN_DIR`: the resumable state of a run, and a model made from it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from sft_dist.checkpoint.catalog import Checkpoint, list_checkpoints, set_aside
from sft_dist.checkpoint.disk import gib
from sft_dist.config.loader import load_resolved
from sft_dist.config.schema import Recipe
from sft_dist.errors import EXIT_DATA, EXIT_DONE, CheckpointError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb `checkpoint` with its three actions."""
    verb = subparsers.add_parser("checkpoint", help="list, verify and export the checkpoints of a run")
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", help="list the checkpoints, oldest first")
    verify = actions.add_parser("verify", help="read every file and compare its SHA-256; exits 65 if any is bad")
    export = actions.add_parser("export", help="write a Hugging Face folder (an adapter folder for LoRA)")
    for action, function in ((ls, list_them), (verify, verify_them), (export, export_one)):
        action.add_argument("run_dir", metavar="RUN_DIR", type=Path)
        action.add_argument("--json", action="store_true", help="one JSON value on stdout")
        action.set_defaults(func=function)
    export.add_argument("--step", type=int, help="default: the newest good checkpoint")
    export.add_argument("--merge", action="store_true", help="fold the adapter into its base model")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of a whole model (default: as it was trained)"
    )
    export.add_argument("--max-file-gb", type=float, default=5.0, metavar="GB", help="of one weights file (default 5)")
    export.add_argument("--out", type=Path, help="default: RUN_DIR/export, or RUN_DIR/export-merged with --merge")


def list_them(args: argparse.Namespace) -> int:
    """Steps, sizes and dates; reads manifests only."""
    found = list_checkpoints(args.run_dir)
    if args.json:
        print(json.dumps([_as_json(checkpoint) for checkpoint in found], indent=2))
        return EXIT_DONE
    for checkpoint in found:
        print(_as_line(checkpoint, checkpoint.fault or ""))
    for path in set_aside(args.run_dir):
        print(f"{path.name}  set aside as bad")
    if not found:
        print(f"{args.run_dir}: no checkpoint yet", file=sys.stderr)
    return EXIT_DONE


def verify_them(args: argparse.Namespace) -> int:
    """Prove every file of every checkpoint; changes nothing. 65 when any is bad, naming file and step."""
    found = list_checkpoints(args.run_dir, proven=True)
    bad = [checkpoint for checkpoint in found if checkpoint.fault]
    aside = [path.name for path in set_aside(args.run_dir)]
    if args.json:
        print(json.dumps([_as_json(checkpoint) for checkpoint in found], indent=2))
    else:
        for checkpoint in found:
            print(_as_line(checkpoint, f"BAD  {checkpoint.fault}" if checkpoint.fault else "good"))
        for name in aside:
            print(f"{name}  set aside as bad")
    if not found:
        print(
            f"sft-dist: error: {args.run_dir}: no checkpoint is left"
            if aside
            else f"{args.run_dir}: no checkpoint yet",
            file=sys.stderr,
        )
    for checkpoint in bad:
        print(f"sft-dist: error: step {checkpoint.step} in {checkpoint.path}: {checkpoint.fault}", file=sys.stderr)
    return EXIT_DATA if bad or (aside and not found) else EXIT_DONE


def export_one(args: argparse.Namespace) -> int:
    """Make a model folder from one checkpoint."""
    from sft_dist.checkpoint.export import export_from_checkpoint
    from sft_dist.checkpoint.export_certificate import Words
    from sft_dist.data.templates import resolve_template
    from sft_dist.models.load import DTYPES, load_tokenizer

    recipe = _recipe_of(args.run_dir)
    tokenizer = load_tokenizer(recipe.model)
    template = resolve_template(recipe.data.chat_template, tokenizer)
    out = args.out or args.run_dir / ("export-merged" if args.merge else "export")
    words = Words(tokenizer, template.text, template.stop_token_ids(tokenizer))
    certificate = export_from_checkpoint(
        args.run_dir,
        recipe,
        words,
        out,
        step=args.step,
        merge=args.merge,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        file_bytes=int(args.max_file_gb * 1e9),
    )
    if args.json:
        print(json.dumps({"path": str(out), "certificate": asdict(certificate)}))
    else:
        print(f"{out}   {certificate.line()}")
    return EXIT_DONE


def _recipe_of(run_dir: Path) -> Recipe:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run_dir}: holds no config.yaml, so it is no run folder")
    return load_resolved(path)


def _as_line(checkpoint: Checkpoint, remark: str) -> str:
    head = f"step {checkpoint.step:>8}  {gib(checkpoint.num_bytes):>10}  {checkpoint.written:<25}"
    return f"{head}  {checkpoint.world_size} rank{'s' if checkpoint.world_size != 1 else ''}  {remark}".rstrip()


def _as_json(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "num_bytes": checkpoint.num_bytes,
        "world_size": checkpoint.world_size,
        "written": checkpoint.written,
        "fault": checkpoint.fault,
    }
