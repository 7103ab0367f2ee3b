"""`eval` and `chat` on exported folders: full models and adapters, through the command line."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_dist.checkpoint.export import export_model, package_of
from sft_dist.checkpoint.export_certificate import Base, Probe, Words, probe_ids
from sft_dist.checkpoint.weights import plain_weights
from sft_dist.cli import main as cli
from sft_dist.config.loader import load_recipe
from sft_dist.config.schema import ModelSection
from sft_dist.data.prepare import prepare
from sft_dist.data.templates import ChatTemplate
from sft_dist.evaluate.dialogue import Dialogue, Streamer
from sft_dist.evaluate.stopping import StopText
from sft_dist.models.base import load_base
from sft_dist.models.speaker import Speaker, load_speaker

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<user>",
    "<assistant>",
    "plum",
    "fig",
    "kiwi",
    "pear",
    "lime",
    "nut",
    "one",
    "two",
    "three",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
RECIPE = """
model: {path: somewhere/else}
data: {sources: [{path: data.jsonl}], seq_len: 32, eval_fraction: 0.25, cache_dir: cache}
eval: {max_new_tokens: 6}
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def network() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def exported(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, base: Base | None = None) -> Path:
    """A folder as a run leaves it, certified."""
    ids = probe_ids(len(WORDS))
    with torch.no_grad():
        probe = Probe(ids, model(input_ids=ids).logits, None, limit=0.0)
    package = package_of(model, Words(tokenizer, TEMPLATE, [2]), base)
    export_model(package, plain_weights(model.state_dict()), out, probe)
    return out


@pytest.fixture
def export(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A full export beside a recipe and 24 conversations; the test runs in that folder."""
    monkeypatch.chdir(tmp_path)
    model = network()
    draw = random.Random(0)
    with Path("data.jsonl").open("w") as file:
        for _ in range(24):
            words = draw.choices(WORDS[5:], k=draw.randint(1, 5))
            turns = [("user", " ".join(words)), ("assistant", " ".join(reversed(words)))]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    Path("r.yaml").write_text(RECIPE)
    return exported(model.eval(), tokenizer, Path("export"))


@pytest.fixture
def adapter(export: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """An adapter on `export` that changes its answers."""
    base = AutoModelForCausalLM.from_pretrained(export)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.peft_config["default"].base_model_name_or_path = str(export)
    return exported(tuned.eval(), tokenizer, Path("adapter"), Base(0, network))


def test_an_adapter_of_a_4_bit_base_speaks_on_that_base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    folder = exported(LlamaForCausalLM(config).eval(), tokenizer, tmp_path / "base")
    load = partial(load_base, ModelSection(path=str(folder)), dtype=torch.float32, seed=0, vocab_size=0, four_bits=True)
    tuned = get_peft_model(load(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tuned.peft_config["default"].base_model_name_or_path = str(folder)
    out = exported(tuned.eval(), tokenizer, tmp_path / "adapter", Base(0, load, "float32"))

    def difference() -> float:
        speaker = load_speaker(str(out), dtype=torch.float32, device=torch.device("cpu"))
        ids = probe_ids(len(WORDS))
        with torch.no_grad():
            return float((speaker.model(input_ids=ids).logits - tuned(input_ids=ids).logits).abs().max())

    assert difference() == 0.0
    record = out / "export_certificate.json"
    record.write_text(record.read_text().replace('"quantised_base": "float32"', '"quantised_base": null'))
    assert difference() > 0.1  # the plain base says something else


def expected_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> tuple[float, int]:
    """The held-out documents one by one through stock transformers, in float64."""
    recipe = load_recipe(["r.yaml"])
    held_out = prepare(recipe, _with_template(tokenizer), notice=lambda text: None).eval
    assert held_out is not None
    total, count = 0.0, 0
    for example in map(held_out.example, range(len(held_out))):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        with torch.no_grad():
            log_probs = F.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
        supervised = torch.from_numpy(example.loss_weights[1:]) > 0
        total -= log_probs[:-1].gather(1, ids[1:, None])[:, 0][supervised].sum().item()
        count += int(supervised.sum())
    return total / count, count


def _with_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """`say(text, model, *options)`: chat with `text` as stdin; returns (exit code, answers, errors)."""

    def run(text: str, *arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = cli.main(["chat", *arguments])
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return run


def greedy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, text: str, num: int) -> str:
    """What the model writes after `text`, token by token without a cache, up to </s>."""
    row = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(row)
    with torch.no_grad():
        while len(row) < start + num:
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == 2:
                break
    return tokenizer.decode(row[start:], skip_special_tokens=True).strip()


def test_eval_gives_the_loss_of_the_documents_one_by_one(
    export: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(export), "r.yaml", "--num", "4", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    loss, count = expected_loss(network(), tokenizer)
    assert math.isclose(found["eval_loss"], loss, rel_tol=1e-6)
    assert (found["num_loss_tokens"], found["split"], found["num_examples"], found["num_checked"]) == (
        count,
        "eval",
        6,
        4,
    )
    assert 0 <= found["exact_match"] <= 1 and found["model"] == str(export)


def test_eval_of_an_adapter_measures_the_adapted_model(
    adapter: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import AutoPeftModelForCausalLM

    assert cli.main(["eval", str(adapter), "r.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tuned, _ = expected_loss(AutoPeftModelForCausalLM.from_pretrained(adapter).eval(), tokenizer)
    base, _ = expected_loss(network(), tokenizer)
    assert math.isclose(found["eval_loss"], tuned, rel_tol=1e-6) and abs(tuned - base) > 0.01
    assert found["exact_match"] is None


def test_eval_counts_exact_answers(
    export: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some references are what the model says anyway."""
    model, lines, num_right = network(), [], 0
    for number, words in enumerate(("plum fig", "kiwi", "pear lime nut", "one two", "two", "three fig", "nut", "lime")):
        said = greedy(model, tokenizer, f"<user> {words} </s> <assistant>", 6)
        is_right = bool(said) and number % 2 == 1
        num_right += is_right
        turns = [("user", words), ("assistant", said if is_right else "plum plum plum plum")]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    Path("test.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main(["eval", str(export), "r.yaml", "data.test_sources=[{path: test.jsonl}]", "--num", "8"]) == 0
    shown = capsys.readouterr().out
    assert num_right >= 2
    assert "split        test, 8 examples" in shown and f"exact match  {num_right / 8:.1%} of 8 answers" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "r.yaml"], "no such model folder"),
        (["export", "r.yaml", "--num", "-1"], "must be 0"),
        (["export", "r.yaml", "data.eval_fraction=0"], "nothing held out"),
    ],
    ids=["no folder", "negative", "nothing held out"],
)
def test_eval_refuses_in_one_line(
    export: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_chat_answers_each_line_and_remembers(export: Path, tokenizer: PreTrainedTokenizerFast, say) -> None:  # type: ignore[no-untyped-def]
    model, options = network(), (str(export), "--max-new-tokens", "6")
    first = greedy(model, tokenizer, "<user> plum fig </s> <assistant>", 6)
    second = greedy(model, tokenizer, f"<user> plum fig </s> <assistant> {first} </s> <user> kiwi </s> <assistant>", 6)
    anew = greedy(model, tokenizer, "<user> kiwi </s> <assistant>", 6)
    assert say("plum fig\n\nkiwi\n", *options)[:2] == (0, [first, second])
    assert say("plum fig\n/clear\nkiwi\n/exit\nplum\n", *options)[:2] == (0, [first, anew])
    assert len({first, second, anew}) == 3


def test_chat_speaks_through_an_adapter(adapter: Path, tokenizer: PreTrainedTokenizerFast, say) -> None:  # type: ignore[no-untyped-def]
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    expected = greedy(model, tokenizer, "<user> pear lime </s> <assistant>", 6)
    assert say("pear lime\n", str(adapter), "--max-new-tokens", "6")[:2] == (0, [expected])


def test_chat_stops_when_the_context_is_full(export: Path, say) -> None:  # type: ignore[no-untyped-def]
    code, _, errors = say("plum " * 70 + "\n", str(export))
    assert code == 2 and "the model's context 64" in errors


def pieces(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], stop_strings: list[str], opening: Sequence[int] = ()
) -> tuple[list[str], str]:
    shown: list[str] = []
    streamer = Streamer(tokenizer, [2], stop_strings, shown.append, opening)
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return shown, streamer.text


def test_a_stream_never_shows_the_stop_or_its_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer.convert_tokens_to_ids(word) for word in ("plum", "one", "fig", "one", "two", "three")]
    shown, text = pieces(tokenizer, ids, ["one two three"])
    assert shown == ["plum", " one fig"] and text == "plum one fig"  # "one" waited until "fig" proved it no stop
    assert pieces(tokenizer, [*ids[:5], 2], ["one two three"])[1] == "plum one fig one two"
    assert pieces(tokenizer, [2], [])[0] == []


def test_how_an_answer_is_opened_is_not_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    plum, fig, kiwi = (tokenizer.convert_tokens_to_ids(word) for word in ("plum", "fig", "kiwi"))
    assert pieces(tokenizer, [plum, fig, kiwi, fig], [], [plum, fig]) == (["kiwi", " fig"], "kiwi fig")
    assert pieces(tokenizer, [plum, kiwi, fig], [], [plum, fig])[1] == "plum kiwi fig"  # it did not open it so


def test_a_dialogue_leaves_out_what_the_template_opens_answers_with(tokenizer: PreTrainedTokenizerFast) -> None:
    """As gpt-oss names its channel: the prompt ends before it, and the next prompt has it from the template."""
    model = network()
    asked = "<user> plum fig </s> <assistant>"
    first, *others = greedy(model, tokenizer, asked, 6).split()
    template = ChatTemplate(
        "opened", TEMPLATE.replace("m['content']", f"('{first} ' if m['role'] == 'assistant' else '') + m['content']")
    )
    assert template.bind(tokenizer).opening == f"{first} "
    dialogue, shown = Dialogue(Speaker(model, tokenizer), template, model.generation_config, max_new_tokens=6), []
    assert dialogue.reply("plum fig", shown.append) == " ".join(others) == "".join(shown)
    second = greedy(model, tokenizer, f"{asked} {first} {' '.join(others)} </s> <user> kiwi </s> <assistant>", 6)
    assert dialogue.reply("kiwi", shown.append) == second.removeprefix(f"{first} ")


def test_chat_asks_without_thoughts_where_the_template_can(
    export: Path, tokenizer: PreTrainedTokenizerFast, say
) -> None:  # type: ignore[no-untyped-def]
    words = "{{ '<assistant> ' + ('nut nut ' if enable_thinking is defined and not enable_thinking else '') }}"
    Path("thinking.jinja").write_text(TEMPLATE.replace("{{ '<assistant> ' }}", words))
    said = ("plum fig\n", str(export), "--template", "thinking.jinja", "--max-new-tokens", "6")
    expected = [greedy(network(), tokenizer, f"<user> plum fig </s> <assistant>{end}", 6) for end in ("", " nut nut")]
    assert expected[0] != expected[1]
    assert [say(*said)[1], say(*said, "--no-thinking")[1]] == [[text] for text in expected]


def test_a_stop_text_of_several_tokens_ends_a_row_once_it_is_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    one, two, three, fig = (tokenizer.convert_tokens_to_ids(word) for word in ("one", "two", "three", "fig"))
    criterion = StopText(tokenizer, ["two three"], num_prompt_tokens=2)
    rows = torch.tensor([[two, three, one, fig], [fig, fig, two, three], [fig, two, three, fig]])
    assert criterion(rows, None).tolist() == [False, True, False]  # what stands in the prompt does not count
    assert criterion(rows[:, :3], None).tolist() == [False, False, False]


def test_a_dialogue_ends_at_a_stop_text_of_several_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model, words = network(), WORDS[5:]
    for stop in (f"{one} {two}" for one in words for two in words):
        full = greedy(model, tokenizer, f"<user> plum fig {stop} <assistant>", 12)
        answer = full.split(stop)[0].strip()
        if answer and answer != full:
            break
    assert answer and answer != full
    template = ChatTemplate("words", TEMPLATE.replace("</s>", stop), stop_text=stop)
    dialogue = Dialogue(Speaker(model, tokenizer), template, model.generation_config, max_new_tokens=12)
    shown: list[str] = []
    assert dialogue.reply("plum fig", shown.append) == answer
    assert "".join(shown) == answer and len(shown) > 1
