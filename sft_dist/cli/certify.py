"""`sft-dist certify`: prove boundaries, positions and masks on this model, attention kernel and batch layout."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from sft_dist.cli.arguments import add_recipe_arguments, read_recipe


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("certify", help="prove that packing changes nothing here", description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="figures and limits as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 when every check passes; a failing one is an error that names the way out."""
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
    for check in checks:
        print(f"  passed  {check.figure:8.1e} <= {check.limit:.0e}  {check.name}")
    if recipe.parallel.sequence > 1:
        print(f"rows were whole here; a run proves them cut among {recipe.parallel.sequence} when it starts")
    return 0
