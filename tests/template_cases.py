"""Chat templates in the wild, conversations to put through them, and tokenizers that hold their special tokens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_dist.types import Conversation, Message

# name -> (how it writes an answer, stop text after an answer in the middle, after the last answer)
as_is, trimmed = str, str.strip


def falcon(answer: str) -> str:
    return answer.replace("\r\n", "\n").replace("\n\n", "\n").strip()


def final(answer: str) -> str:
    """Its generation prompt ends before the channel, which is the model's to name."""
    return f"<|channel|>final<|message|>{answer}"


def qwen3(answer: str) -> str:
    return answer.lstrip("\n")


BUILTIN = {
    "alpaca": (as_is, "</s>", "</s>"),
    "phi3": (as_is, "<|end|>", "<|end|>"),
    "chatml": (as_is, "<|im_end|>", "<|im_end|>"),
    "llama3": (trimmed, "<|eot_id|>", "<|eot_id|>"),
}
UNTAGGED = {
    "chujiezheng/alpaca": (trimmed, "</s>", "</s>"),
    "chujiezheng/chatml": (trimmed, "<|im_end|>", "<|im_end|>"),
    # Falcon has no stop text: the end token is put behind the last answer.
    "chujiezheng/falcon-instruct": (falcon, "", "\n\n</s>"),
    "chujiezheng/gemma-it": (trimmed, "<end_of_turn>", "<end_of_turn>"),
    "chujiezheng/granite-3.0-instruct": (as_is, "<|end_of_text|>", "<|end_of_text|>"),
    "chujiezheng/llama-2-chat": (trimmed, " </s>", " </s>"),
    "chujiezheng/llama-3-instruct": (trimmed, "<|eot_id|>", "<|eot_id|>"),
    "chujiezheng/mistral-instruct": (trimmed, "</s>", "</s>"),
    "chujiezheng/openchat-3.5": (as_is, "<|end_of_turn|>", "<|end_of_turn|>"),
    "chujiezheng/phi-3": (trimmed, "<|end|>", "<|end|>"),
    "chujiezheng/qwen2.5-instruct": (as_is, "<|im_end|>", "<|im_end|>"),
    "chujiezheng/saiga": (trimmed, "</s>", "</s>"),
    "chujiezheng/vicuna": (trimmed, "</s>", "</s>"),
    "chujiezheng/zephyr": (trimmed, "</s>", "</s>"),
    "trl/cohere": (trimmed, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "trl/deepseekv3": (as_is, "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "trl/gemma": (trimmed, "<end_of_turn>", "<end_of_turn>"),
    "trl/gemma3": (trimmed, "<end_of_turn>", "<end_of_turn>"),
    "trl/gptoss": (final, "<|end|>", "<|return|>"),
    "trl/llama3": (trimmed, "<|eot_id|>", "<|eot_id|>"),
    "trl/llama3_1": (trimmed, "<|eot_id|>", "<|eot_id|>"),
    "trl/llama3_2": (trimmed, "<|eot_id|>", "<|eot_id|>"),
    "trl/phi3": (as_is, "<|end|>", "<|end|>"),
    "trl/phi3_5": (as_is, "<|end|>", "<|end|>"),
    "trl/qwen2_5": (as_is, "<|im_end|>", "<|im_end|>"),
    "trl/qwen3": (qwen3, "<|im_end|>", "<|im_end|>"),
}
# With generation tags; beside it the same template without.
TAGGED = {
    "trl/cohere_training": "trl/cohere",
    "trl/gemma_training": "trl/gemma",
    "trl/gemma3_training": "trl/gemma3",
    "trl/llama3_training": "trl/llama3",
    "trl/phi3_training": "trl/phi3",
    "trl/qwen2_5_training": "trl/qwen2_5",
    "trl/qwen3_training": "trl/qwen3",
}
TEMPLATES = [*UNTAGGED, *TAGGED]
NO_SYSTEM = ("trl/gemma", "trl/gemma_training")  # they raise on a system message

CONVERSATIONS = {
    "single": [("user", "What is 2 + 2?"), ("assistant", "It is 4.")],
    "multi": [("user", "A"), ("assistant", "B b"), ("user", "C"), ("assistant", "D.\n\n- d")],
    "system": [("system", "Short."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Bye!")],
    "unicode": [("user", "Как дела? 漢字"), ("assistant", "Да 🎉 – e\u0301 ü\u2028\u00a0ﬁ \U0001f469\u200d\U0001f467")],
    "spaces": [("user", " q \n"), ("assistant", "  2 before, 1 after "), ("user", "x"), ("assistant", "\n\nlines\n")],
    "look-alike": [
        ("user", "user"),
        ("assistant", "user: assistant <b>B</b> [INST]"),
        ("user", "B"),
        ("assistant", "B"),
    ],
}

SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|end_of_turn|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
]


def conversation(turns: list[tuple[str, str]]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns), source="file.json", id="file.json:7")


def byte_tokenizer(*, special: bool = True) -> PreTrainedTokenizerFast:
    """One token for each UTF-8 byte: no token ever covers two characters, so masks show to the character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, **_ENDS), special)


@lru_cache
def gpt2_tokenizer(shared: Path) -> PreTrainedTokenizerFast:
    """GPT-2's byte-pair tokens, where a token may reach over the edge of an answer."""
    file = str(shared / "data/tokenizers/gpt2/tokenizer.json")
    return _with_special_tokens(PreTrainedTokenizerFast(tokenizer_file=file, **_ENDS), special=True)


_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}


def _with_special_tokens(tokenizer: PreTrainedTokenizerFast, special: bool) -> PreTrainedTokenizerFast:
    if special:
        tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True
        )
    return tokenizer
