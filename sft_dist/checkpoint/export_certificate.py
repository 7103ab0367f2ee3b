"""The proof of an export: what a user will load is what was trained, found out before the folder gets its name.

    weights   every tensor, read back through the safetensors library, has the dtype, the shape and the SHA-256 of what
              was gathered from the engine while it was written; no file and no tensor is missing or too many
    words     tokenizer, chat template and stop tokens read back as those of the training
    logits    stock Transformers (or PEFT) loads the folder and answers a probe as the trained model did: bit for bit in
              fp32 on a CPU, within a stated limit where the arithmetic differs (bf16, another device, a merge)

Re-opening a large model is affordable: its decoder layers stay on disk and come in one after another, through
Accelerate's disk offload, so embeddings, head and one layer are what it takes. An adapter needs its base in memory;
where that does not fit, PEFT is asked for the names alone and the record says that logits were not compared.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from sft_dist.checkpoint.weights import Written, weights_fault
from sft_dist.errors import CertificateError
from sft_dist.models.base import RECORD

if TYPE_CHECKING:
    from peft import PeftModel

PROBE_TOKENS = 32
GREETING = [{"role": "user", "content": "Name 3 things."}, {"role": "assistant", "content": "One, two, three."}]


@dataclass(frozen=True, slots=True)
class Probe:
    """What the trained model answered, to be repeated by the export."""

    input_ids: Tensor  # int64 [1, T]
    logits: Tensor  # fp32 [1, T, V] on the CPU
    attention: str | None  # the implementation it ran with; None: the architecture's default
    limit: float  # on |difference| / |logits| (2-norms); 0: bit for bit


@dataclass(frozen=True, slots=True)
class Words:
    """What goes with the weights so that the model is talked to as it was trained."""

    tokenizer: Any
    template_text: str
    stop_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Base:
    """The model under an adapter."""

    num_bytes: int  # in memory
    load: Callable[[], nn.Module]
    quantised: str | None = None  # in 4 bits, multiplied in this dtype


@dataclass(frozen=True, slots=True)
class Certificate:
    """The record that stays in the folder."""

    num_tensors: int
    dtype: str
    reopened: str  # by what
    difference: float | None  # of logits, relative; None where they were not compared
    limit: float
    quantised_base: str | None = None  # what the adapter stands on: 4 bits, multiplied in this dtype

    def line(self) -> str:
        """For the user: `291 tensors equal, logits bit for bit (transformers, layer by layer)`."""
        if self.difference is None:
            logits = "logits not compared"
        elif self.difference == 0:
            logits = "logits bit for bit"
        else:
            logits = f"logits {self.difference:.1e} apart (limit {self.limit:.0e})"
        return f"{self.num_tensors} tensors equal, {logits} ({self.reopened})"


def probe_ids(vocab_size: int) -> Tensor:
    """int64 [1, PROBE_TOKENS]: tokens from the whole vocabulary, always the same."""
    return torch.randint(0, vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def certify_model(folder: Path, written: Mapping[str, Written], words: Words, probe: Probe, code: bool) -> Certificate:
    """Prove a folder with a whole model. `code`: its architecture comes as remote code.

    Raises CertificateError that names the first difference.
    """
    _refuse(weights_fault(folder, "model", written))
    _refuse(words_fault(folder, words))
    dtypes = {entry.dtype for entry in written.values() if "float" in entry.dtype}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    named = str(config.dtype).removeprefix("torch.")
    if dtypes and named not in dtypes:
        raise CertificateError(f"config.json says {named}, the tensors are {', '.join(sorted(dtypes))}")
    with _offloaded(folder, config, probe.attention, code) as model:
        found = _logits(model, probe.input_ids)
    return Certificate(len(written), named, "transformers, layer by layer", _compare(found, probe), probe.limit)


def certify_adapter(
    folder: Path, written: Mapping[str, Written], words: Words, probe: Probe, base: Base
) -> Certificate:
    """Prove an adapter folder on its base model. Raises CertificateError that names the first difference."""
    _refuse(weights_fault(folder, "adapter_model", written))
    _refuse(words_fault(folder, words))
    dtypes = {entry.dtype for entry in written.values()}
    free = _free_bytes()
    if base.num_bytes > 0.8 * free:
        reason = f"peft was not asked: its base needs {base.num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        return Certificate(len(written), "/".join(sorted(dtypes)), reason, None, probe.limit, base.quantised)
    from peft import PeftModel

    with _quietly():
        model = PeftModel.from_pretrained(base.load(), folder)
        strangers = _unknown_names(model, folder)
    if strangers:
        raise CertificateError(f"{strangers[0]}: PEFT finds no place for it")
    return Certificate(
        len(written),
        "/".join(sorted(dtypes)),
        "peft on its base",
        _compare(_logits(model, probe.input_ids), probe),
        probe.limit,
        base.quantised,
    )


def write_record(folder: Path, certificate: Certificate) -> None:
    """Leave what was proven in the folder; raises OSError."""
    (folder / RECORD).write_text(json.dumps(asdict(certificate), indent=2, sort_keys=True) + "\n")


def words_fault(folder: Path, words: Words) -> str | None:
    """The first difference between the words in the folder and those of the training."""
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    found = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if words.stop_token_ids and found != list(words.stop_token_ids):
        return f"generation_config.json stops at {found}, the training at {list(words.stop_token_ids)}"
    reopened = AutoTokenizer.from_pretrained(folder)
    if (reopened.chat_template or "") != words.template_text:
        return "chat template: differs from the one of the training"
    text = "".join(message["content"] for message in GREETING) + " ".join(map(str, words.tokenizer.all_special_tokens))
    if reopened(text)["input_ids"] != words.tokenizer(text)["input_ids"]:
        return "tokenizer: does not encode as the one of the training"
    return None


@contextmanager
def _offloaded(folder: Path, config: PretrainedConfig, attention: str | None, code: bool) -> Iterator[nn.Module]:
    """Stock Transformers' model of `folder`, its decoder layers read from the files when they are needed.

    Raises CertificateError when a name or shape does not fit the architecture.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    with tempfile.TemporaryDirectory() as scratch, _quietly():  # safetensors stay where they are: nothing goes there
        try:
            model, problems = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                device_map=device_map(config, code),
                offload_folder=scratch,
                output_loading_info=True,
                trust_remote_code=code,
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CertificateError(f"transformers cannot load it ({str(error).strip().splitlines()[0]})") from error
        for kind, names in problems.items():
            if names:
                raise CertificateError(f"transformers reports {kind}: {sorted(map(str, names))[0]}")
        yield model.eval()


def device_map(config: PretrainedConfig, code: bool = False) -> dict[str, str]:
    """Decoder layers on disk, everything else on the CPU; a model without repeated layers is kept whole."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    lists = [name for name, module in skeleton.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return {"": "cpu"}
    repeated = max(lists, key=lambda name: len(skeleton.get_submodule(name)))
    places: dict[str, str] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path == repeated:
                places.update({f"{path}.{number}": "disk" for number in range(len(child))})  # type: ignore[arg-type]
            elif repeated.startswith(f"{path}."):
                visit(f"{path}.", child)
            else:
                places[path] = "cpu"

    visit("", skeleton)
    return places


@torch.no_grad()
def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    return model.eval()(input_ids=input_ids, use_cache=False).logits.float().cpu()


def _compare(found: Tensor, probe: Probe) -> float:
    """Relative distance of the logits; raises CertificateError beyond the probe's limit."""
    if found.shape != probe.logits.shape:
        raise CertificateError(f"logits are {tuple(found.shape)}, the trained model's {tuple(probe.logits.shape)}")
    difference = 0.0 if torch.equal(found, probe.logits) else _distance(found, probe.logits)
    if not difference <= probe.limit:
        allowed = "they must be equal" if probe.limit == 0 else f"at most {probe.limit:.0e} is allowed"
        raise CertificateError(f"logits are {difference:.1e} apart from the trained model's, {allowed}")
    return difference


def _distance(found: Tensor, expected: Tensor) -> float:
    scale = torch.linalg.vector_norm(expected.double())
    return float(torch.linalg.vector_norm(found.double() - expected.double()) / scale)


def _unknown_names(model: PeftModel, folder: Path) -> list[str]:
    """Names in the adapter's file that the loaded model does not have."""
    from peft.utils import get_peft_model_state_dict

    with _quietly():
        held = get_peft_model_state_dict(model)
    return sorted(load_file(folder / "adapter_model.safetensors").keys() - held.keys())


def _free_bytes() -> int:
    """What the machine could still give to this process."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise CertificateError(fault)


@contextmanager
def _quietly() -> Iterator[None]:
    """Upstream's remarks on offloading are not for the user."""
    level, accelerate = transformers_logging.get_verbosity(), logging.getLogger("accelerate.big_modeling")
    transformers_logging.set_verbosity_error()
    accelerate.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        accelerate.disabled = False
