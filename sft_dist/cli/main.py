"""`sft-dist VERB ...`: find the verb, import only its module, run it, turn errors into one line and an exit code.

A verb is a module with `add_parser(subparsers)`, which sets `func(args) -> int`. Nothing heavy is imported before the
verb is known, so `--help` and mistakes answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from sft_dist import __version__
from sft_dist.cli.arguments import Parser
from sft_dist.config import foreign, keys
from sft_dist.config.overrides import join_options
from sft_dist.errors import ConfigError, SftError
from sft_dist.redaction import hiding_secrets

VERBS = {
    "quickstart": "a small fine-tune from nothing, measured before and after",
    "train": "fine-tune on this machine",
    "submit": "fine-tune on a Slurm cluster",
    "slurm": "status, logs, cancel, requeue of a submitted run",
    "where": "where each rank of a run is",
    "fetch": "models and data from hubs into the cache",
    "estimate": "memory, time and cost before a run",
    "data": "prepare, inspect, count and plan training data",
    "certify": "prove boundaries, positions and masks on this model",
    "checkpoint": "list, verify and export checkpoints",
    "audit": "prove what a run was trained on",
    "replay": "rebuild the batch of a step",
    "eval": "held-out loss and answers of a model",
    "chat": "talk to a model in the terminal",
    "report": "one HTML page about a run",
    "doctor": "can training run on this machine?",
    "config": "show, compare and check recipes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. `--traceback` shows where an error came from."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with hiding_secrets():
        return _answer([argument for argument in arguments if argument != "--traceback"], "--traceback" in arguments)


def _answer(arguments: list[str], show_traceback: bool) -> int:
    try:
        return _run(arguments)
    except SftError as error:
        if show_traceback:
            traceback.print_exc()
        _complain(error)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left: `sft-dist config show R.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _run(arguments: list[str]) -> int:
    arguments = join_options(arguments)
    args, rest = _parser(arguments).parse_known_args(arguments)
    options = [item for item in rest if item.startswith("-")]
    if options or (rest and not hasattr(args, "items")):
        raise ConfigError(_unknown_argument((options or rest)[0]))
    if rest:
        args.items += rest  # argparse takes no positional arguments after an option has ended their row
    code = args.func(args)
    sys.stdout.flush()
    return int(code)


def _parser(arguments: Sequence[str]) -> Parser:
    """The parser of all verbs, of which only the asked one knows its options."""
    parser = Parser(prog="sft-dist", description="Supervised fine-tuning on instruction data.")
    parser.add_argument("--version", action="version", version=f"sft-dist {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    asked = next((argument for argument in arguments if not argument.startswith("-")), "")
    if asked and asked not in VERBS:
        near = keys.nearest(asked, VERBS)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise ConfigError(f"{asked}: unknown verb: {hint}")
    for verb, text in VERBS.items():
        if verb == asked:
            importlib.import_module(f"sft_dist.cli.{verb}").add_parser(subparsers)
        else:
            subparsers.add_parser(verb, help=text)
    return parser


def _unknown_argument(argument: str) -> str:
    """A remedy for an option that is not one: most are settings of the recipe, or another tool's."""
    name = argument.lstrip("-").partition("=")[0]
    advice = foreign.translate(name, "VALUE", lambda names: None)
    near = [key for key, _ in advice.settings] if advice else keys.suggest(name)
    hint = f"settings are written {near[0]}=VALUE" if near else "see sft-dist --help"
    return f"{argument}: not an option of this command: {hint}"


def _complain(error: SftError) -> None:
    """Each problem on a line of its own; indented lines belong to the one before."""
    for line in str(error).splitlines():
        print(line if line.startswith(" ") else f"sft-dist: error: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
