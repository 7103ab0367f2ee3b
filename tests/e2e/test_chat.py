"""`sft-dist chat` on real pretrained weights, spoken to through pipes as another program would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.data.builtin_templates import BUILTIN
from sft_dist.data.templates import resolve_template

pytestmark = pytest.mark.slow
NEW_TOKENS = 24


def greedy(model: Path, question: str) -> str:
    """What stock transformers answers to alpaca's prompt, begun as training begins a document."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], chat_template=BUILTIN["alpaca"], tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    first = [tokenizer.bos_token_id] if resolve_template("alpaca", tokenizer).bind(tokenizer).bos_to_prepend else []
    ids = torch.tensor([first + tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    answer = AutoModelForCausalLM.from_pretrained(model).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_each_line_is_answered_before_the_next_one_is_sent(shared: Path) -> None:
    model = shared / "models" / "stories260K"
    options = ["--template", "alpaca", "--max-new-tokens", str(NEW_TOKENS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "chat", str(model), *options],
        env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    answers = []
    try:
        for question in ("Tell me a story.", "/clear", "What did Lily see?"):
            process.stdin.write(question + "\n")
            process.stdin.flush()
            if question != "/clear":
                answers.append(process.stdout.readline().strip())
        _, errors = process.communicate("/exit\n", timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert answers == [
        greedy(model, "Tell me a story.").split("\n")[0],
        greedy(model, "What did Lily see?").split("\n")[0],
    ]
    assert all(len(answer) > 20 for answer in answers), answers
