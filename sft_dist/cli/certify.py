"""`sft-dist certify`: prove boundaries, positions and masks on this model, attention kernel and batch layout; with
`--layout`, that one optimizer step under the recipe's engine and mesh is that of one process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe
from sft_dist.errors import CertificateError, ConfigError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("certify", help="prove that packing changes nothing here", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--layout", action="store_true", help="prove engine and mesh instead: one step equals that of one process"
    )
    parser.add_argument("--nproc", type=int, default=None, metavar="N", help="processes of --layout; all GPUs, or 2")
    parser.add_argument("--json", action="store_true", help="figures and limits as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when every check passes; a failing one is an error that names the way out."""
    if args.layout:
        return prove_layout(args)
    if args.nproc is not None:
        raise ConfigError("--nproc belongs to --layout: the other checks need one process")
    import torch

    from sft_dist.certify import certify
    from sft_dist.config.auto import compute_dtype
    from sft_dist.models import attention
    from sft_dist.models.load import DTYPES, load_config, load_model
    from sft_dist.models.packed import PackedCausalLM, pick_head

    recipe = read_recipe(args.items)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[compute_dtype(recipe, device.type)]
    config = load_config(recipe.model)
    backend = attention.choose_backend(recipe.model.attention, config, device, dtype)
    model = load_model(recipe.model, dtype=dtype, seed=recipe.run.seed, vocab_size=0).to(device)
    is_packed = recipe.data.packing != "padded"
    if is_packed:
        attention.install(model, backend.name)
    name, head, _ = pick_head(recipe.kernels.head, device)
    packed = PackedCausalLM(model, head).eval()
    checks = certify(
        torch.no_grad()(packed.hidden_states),
        model.config,
        head=head,
        backend=backend.name if is_packed else None,
        packing=recipe.data.packing,
        device=device,
        dtype=dtype,
        seed=recipe.run.seed,
    )
    if args.json:
        print(json.dumps([asdict(check) | {"passed": check.passed} for check in checks], indent=2))
        return 0
    print(
        f"{model.config.model_type}, attention {backend.name if is_packed else 'of its own'}, head {name}, "
        f"packing {recipe.data.packing}"
    )
    show([asdict(check) for check in checks])
    if recipe.parallel.sequence > 1:
        print(f"rows were whole here; a run proves them cut among {recipe.parallel.sequence} when it starts")
    return 0


def show(checks: list[dict[str, Any]]) -> None:
    """One line each: found, allowed, name."""
    for check in checks:
        print(f"  passed  {check['figure']:8.1e} <= {check['limit']:.0e}  {check['name']}")


def prove_layout(args: argparse.Namespace) -> int:
    """Start `sft_dist.prove_layout` on the processes asked for and show what it found."""
    read_recipe(args.items)  # its mistakes are told here, once
    number = args.nproc or gpus() or 2
    with tempfile.TemporaryDirectory(prefix="sft-layout-") as folder:
        command = [sys.executable, "-m", "sft_dist.prove_layout", *args.items]
        shared = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "SFT_RENDEZVOUS": f"file://{folder}/meet"}
        ranks = []
        for rank in range(number):
            own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = (Path(folder) / f"{rank}.log").open("w+")
            out = subprocess.PIPE if rank == 0 else log
            ranks.append((subprocess.Popen(command, env=own, stdout=out, stderr=log, text=True), log))
        try:
            printed = ranks[0][0].communicate()[0]
        finally:
            for process, _ in ranks:
                process.kill()
                process.wait()
        lines = [line for line in printed.splitlines() if line.startswith("{")]
        if not lines:
            raise CertificateError(f"layout certificate: rank 0 died: {_last_line(ranks[0][1])}")
    found = json.loads(lines[-1])
    if "error" in found:
        raise CertificateError(found["error"])
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{found['model']}, {found['strategy']} on {number} process(es): {found['reason']}")
    show(found["checks"])
    return 0


def gpus() -> int:
    """How many GPUs there are."""
    import torch

    return torch.cuda.device_count()


def _last_line(log: TextIO) -> str:
    log.seek(0)
    return next((line.strip() for line in reversed(log.readlines()) if line.strip()), "no output")
