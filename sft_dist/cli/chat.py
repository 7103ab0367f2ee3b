"""`sft-dist chat MODEL`: talk to a model in the terminal. Without a terminal, each line of stdin is one turn.

/clear forgets the conversation, /exit (or the end of the input) leaves, Ctrl-C ends an answer early.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from sft_dist.evaluate.dialogue import Dialogue


def add_parser(subparsers: Any) -> None:
    """Add the verb `chat`."""
    parser = subparsers.add_parser("chat", help="talk to a model in the terminal", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model folder such as RUN_DIR/export, or a hub id")
    parser.add_argument("--template", default="auto", help="chat template (default: the one that came with the model)")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument(
        "--no-thinking",
        action="store_true",
        help="ask for answers without thoughts, where the template has such a prompt",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default 512)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Answer turns until there are none left."""
    from rich.console import Console

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: must be 1 or more")
    dialogue = _open(args)
    console = Console(highlight=False)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.print(f"{args.model}   /clear forgets, /exit leaves", style="dim", markup=False)
    for text in _turns(console, is_terminal):
        if text == "/exit":
            break
        if text == "/clear":
            dialogue.clear()
        elif text:
            _answer(console, dialogue, text, is_terminal)
    return EXIT_DONE


def _open(args: argparse.Namespace) -> Dialogue:
    import torch
    from transformers import GenerationConfig

    from sft_dist.data.templates import resolve_template
    from sft_dist.evaluate.dialogue import Dialogue
    from sft_dist.models.packed import causal_lm
    from sft_dist.models.speaker import load_speaker

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    speaker = load_speaker(args.model, dtype=dtype, device=torch.device("cuda" if on_gpu else "cpu"))
    template = resolve_template(args.template, speaker.tokenizer)
    if (Path(args.model) / "generation_config.json").is_file():  # an adapter's stop tokens are its own, not the base's
        generation = GenerationConfig.from_pretrained(args.model)
    else:
        generation = causal_lm(speaker.model).generation_config
    return Dialogue(
        speaker,
        template,
        generation,
        max_new_tokens=args.max_new_tokens,
        system=args.system,
        variables={"enable_thinking": False} if args.no_thinking else {},
    )


def _turns(console: Console, is_terminal: bool) -> Iterator[str]:
    """What the user says, stripped, until the input ends."""
    if not is_terminal:
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  # line editing and history for input()

    while True:
        try:
            yield console.input("[bold]you[/]  ").strip()
        except EOFError:
            console.print()
            return


def _answer(console: Console, dialogue: Dialogue, text: str, is_terminal: bool) -> None:
    """Show one answer as it is written. On a terminal a turn that cannot be answered does not end the conversation."""
    try:
        dialogue.reply(text, lambda piece: _show(console, piece))
    except KeyboardInterrupt:
        if not is_terminal:
            raise
    except ConfigError as error:
        if not is_terminal:
            raise
        console.print(str(error), style="red", markup=False, end="")
    console.print("\n" if is_terminal else "")


def _show(console: Console, piece: str) -> None:
    """Print model text; its control characters must not steer the terminal."""
    shown = "".join(character for character in piece if character.isprintable() or character in "\n\t")
    console.print(shown, end="", markup=False, soft_wrap=True)
