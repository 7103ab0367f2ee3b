"""What a template leaves to the model between the generation prompt and an answer's first word.

    generation prompt    <|start|>assistant
    what is trained      <|start|>assistant<|channel|>final<|message|>It is 4.<|return|>
                                          `----- opening ------'

A model is asked with the generation prompt, so everything behind it is its own to write, literals of the template
included; without them it would never have learned how an answer begins. One such literal is not learned: the empty
think block, which some templates put before an answer that came without thoughts. It would teach not to think, and who
wants no thoughts has it in the prompt (Qwen 3: `enable_thinking=False`).
"""

from __future__ import annotations

import re
from itertools import takewhile

_THINKING = re.compile("think|thought|reason", re.IGNORECASE)


def generation_prompt(plain: str, asked: str) -> str:
    """What `add_generation_prompt` changes about the end of a conversation, "" for a template that knows no prompt."""
    shared = takewhile(lambda letters: letters[0] == letters[1], zip(plain, asked, strict=False))
    return asked[sum(1 for _ in shared) :]


def opening(header: str, prompt: str) -> str:
    """The end of `header`, all that stands before an answer, that the model writes itself."""
    _, found, behind = header.rpartition(prompt) if prompt else ("", "", "")
    return "" if not found or _THINKING.search(behind) else behind
