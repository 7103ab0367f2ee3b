"""A conversation with a model: one turn in, the answer streamed out, both remembered.

    dialogue = Dialogue(speaker, template, generation, max_new_tokens=256)
    answer = dialogue.reply("Hello", show=lambda text: print(text, end=""))

The prompt is rendered with the chat template and gets a beginning-of-sequence token exactly where training gives it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from sft_dist.data.bos import begins_with
from sft_dist.data.templates import ChatTemplate
from sft_dist.errors import ConfigError
from sft_dist.evaluate.generation import stock_attention
from sft_dist.evaluate.stopping import stopping_criteria
from sft_dist.models.packed import causal_lm
from sft_dist.models.speaker import Speaker

Show = Callable[[str], None]
_UNDECODED = "�"  # the bytes of a character that is not complete yet


class Dialogue:
    """Turns so far, and how to answer the next one."""

    def __init__(
        self,
        speaker: Speaker,
        template: ChatTemplate,
        generation: GenerationConfig,
        *,
        max_new_tokens: int,
        system: str | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`variables` are what the template reads besides the turns (Qwen 3: `enable_thinking`)."""
        self._variables = dict(variables)
        self._speaker, self._template, self._max_new_tokens = speaker, template, max_new_tokens
        self._tokenizer: Any = speaker.tokenizer
        self._stop_ids = _stop_ids(template.stop_token_ids(self._tokenizer), generation)
        self._stop_strings = template.stop_strings(self._tokenizer)
        self._generation = generation
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def clear(self) -> None:
        """Forget all turns; the system message stays."""
        self._turns = []

    def reply(self, text: str, show: Show) -> str:
        """The answer to `text`; `show` gets it in pieces while it is written. Only a finished answer is remembered.

        Raises ConfigError when the template refuses the turns or they fill the model's context.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        ids = self._prompt(turns)
        lm = causal_lm(self._speaker.model)
        streamer = Streamer(self._tokenizer, self._stop_ids, self._stop_strings, show, self._opening_ids())
        with stock_attention(lm), torch.no_grad():
            prompt = torch.tensor([ids], device=lm.get_input_embeddings().weight.device)
            lm.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._settings(self._room(len(ids))),
                stopping_criteria=stopping_criteria(self._tokenizer, self._stop_strings, len(ids)),
                streamer=streamer,
            )
        self._turns = [*turns, {"role": "assistant", "content": streamer.text}]
        return streamer.text

    def _prompt(self, turns: Sequence[dict[str, str]]) -> list[int]:
        tokenizer = self._tokenizer
        try:
            text = tokenizer.apply_chat_template(
                [*self._system, *turns],
                chat_template=self._template.text,
                tokenize=False,
                add_generation_prompt=True,
                **self._variables,
            )
        except TemplateError as error:
            raise ConfigError(f"chat template {self._template.name}: it refuses these turns ({error})") from error
        bos = self._template.bind(tokenizer).bos_to_prepend
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id, *ids] if bos and not begins_with(text, bos) else ids

    def _opening_ids(self) -> list[int]:
        """How a model begins to answer before it says anything (gpt-oss names the channel): the template writes it anew
        when the answer is a turn of the next prompt."""
        opening = self._template.bind(self._tokenizer).opening
        ids: list[int] = self._tokenizer(opening, add_special_tokens=False)["input_ids"]
        return ids

    def _room(self, num_prompt_tokens: int) -> int:
        """Tokens the answer may have: what was asked for, as far as the model's positions reach."""
        config = causal_lm(self._speaker.model).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None:
            return self._max_new_tokens
        if num_prompt_tokens >= positions:
            raise ConfigError(
                f"the conversation has {num_prompt_tokens:,} tokens and the model's context {positions:,}: "
                "/clear starts a new one"
            )
        return min(self._max_new_tokens, positions - num_prompt_tokens)

    def _settings(self, max_new_tokens: int) -> GenerationConfig:
        settings = copy.deepcopy(self._generation)
        settings.max_new_tokens, settings.max_length = max_new_tokens, None
        settings.eos_token_id = self._stop_ids or None
        settings.stop_strings = None
        settings.use_cache = True
        if settings.pad_token_id is None:
            settings.pad_token_id = self._stop_ids[0] if self._stop_ids else 0
        return settings


class Streamer(BaseStreamer):
    """Gives the text on as tokens arrive, but nothing that may still turn out to be a stop text or half a character,
    nor the tokens of `opening` where the answer begins with them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        stop_strings: Sequence[str],
        show: Show,
        opening: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._stop_ids, self._stop_strings, self._show = tokenizer, stop_ids, stop_strings, show
        self._opening = list(opening)
        self._ids: list[int] | None = None  # None until the prompt has passed
        self._num_shown = 0
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each new token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._stop_ids]
        self.text = self._decoded(self._ids)
        self._show_until(self._num_decided())

    def end(self) -> None:
        """No more tokens: what was held back is text after all."""
        self.text = self.text.rstrip()
        self._show_until(len(self.text))

    def _decoded(self, ids: list[int]) -> str:
        begun = ids[: len(self._opening)]
        words = ids[len(begun) :] if begun == self._opening[: len(begun)] else ids
        text = str(self._tokenizer.decode(words, skip_special_tokens=True))
        for stop in self._stop_strings:
            text = text.split(stop)[0]
        return text.lstrip()

    def _num_decided(self) -> int:
        """Characters that no further token takes back: without half a stop text, half a character, white space."""
        beginnings = (stop[:size] for stop in self._stop_strings for size in range(1, len(stop)))
        undecided = max((len(part) for part in beginnings if self.text.endswith(part)), default=0)
        return len(self.text[: len(self.text) - undecided].rstrip().rstrip(_UNDECODED).rstrip())

    def _show_until(self, end: int) -> None:
        if end > self._num_shown:
            self._show(self.text[self._num_shown : end])
            self._num_shown = end


def _stop_ids(of_template: Sequence[int], generation: GenerationConfig) -> list[int]:
    """The template's stop tokens and those of the model's generation config, each once."""
    given = generation.eos_token_id
    others = [] if given is None else [given] if isinstance(given, int) else list(given)
    return list(dict.fromkeys([*of_template, *others]))
