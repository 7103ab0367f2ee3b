"""Signs on answers: each sign seen where it should be, and not on the plain answer beside it."""

import pytest

from sft_dist.data.exchanges import Exchange
from sft_dist.data.quality import CHECKS, repetition, signs
from sft_dist.data.refusals import REFUSALS, is_refusal

PLAIN = "The capital of France is Paris, which lies on the Seine."
LONG = (
    "Rivers carry water and sediment to the sea, and on the way they shape valleys, plains and deltas, feed lakes and "
    "forests, turn mills, bear ships, part countries and join towns, freeze in winter, flood in spring, run low in the "
    "heat of summer, "
)


def signs_of(answer: str, question: str = "What is the capital of France?", stopped: bool = True) -> tuple[str, ...]:
    return signs(Exchange(question, answer, 10, 10, stopped=stopped))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("short", "No."),
        ("repetitive", "la la li lu " * 12),
        ("repetitive", "四季春夏秋冬" * 20),
        ("refusal", "I'm sorry, but I cannot help with that."),
        ("cut_off", "Here it is:\n```python\nprint(1)"),
        ("cut_off", f"{LONG.strip(', ')} and then they go on until"),
        ("odd_characters", "caf\ufffd au lait, please"),
        ("odd_characters", "It was a very nice cafÃ© in town."),
        ("odd_characters", "Donâ€™t do that, please."),
        ("odd_characters", "A bell\x07 rings in the hall."),
        ("markup", "<|im_start|>assistant\nHello there."),
        ("markup", "It is so.\n### Instruction:\nAnd now?"),
    ],
)
def test_a_sign_is_seen(name, answer):
    assert name in signs_of(answer)


@pytest.mark.parametrize(
    "answer", [PLAIN, f"{LONG.strip(', ')}.", "1. one\n2. two\n3. three", "Über Öl – «ça» 水です。"]
)
def test_plain_answers_have_none(answer):
    assert signs_of(answer) == ()


def test_an_answer_without_its_stop_is_cut_off():
    assert signs_of(PLAIN, stopped=False) == ("cut_off",)


def test_an_echo_makes_up_half_of_the_question():
    assert "echo" in signs_of("the cat sat on the mat", "Repeat: The cat sat  on the mat")
    assert "echo" not in signs_of("Seine", "Which river? Seine, Loire")
    assert "echo" not in signs_of("the cat sat on the mat", "the cat sat on the mat " + PLAIN * 3)


def test_repetition_by_hand():
    words = [str(number) for number in range(12)]
    assert repetition(" ".join(words * 2)) == pytest.approx(1 - 12 / 21)
    assert repetition(" ".join(words)) == 0.0


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        ("English", "As an AI language model, I have no opinions."),
        ("English", "I can’t provide that."),
        ("English", "Unfortunately, I am unable to do so."),
        ("Chinese", "抱歉，我无法回答这个问题。"),
        ("Chinese", "作为一个人工智能语言模型，我没有感情。"),
        ("Russian", "К сожалению, я не могу этого сделать."),
        ("Russian", "Как языковая модель, я не имею мнения."),
        ("Spanish", "Lo siento, pero no puedo hacer eso."),
        ("Portuguese", "Desculpe, mas não posso responder a isso."),
        ("French", "Je suis désolé, mais je ne peux pas le faire."),
        ("German", "Es tut mir leid, das kann ich leider nicht tun."),
    ],
)
def test_refusals_in_their_languages(language, answer):
    assert language in REFUSALS and is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear that. Rest well.",
        "Sorry is a word.",
        "Не могу дождаться лета!",
        PLAIN,
        LONG + "I cannot help",
    ],
)
def test_what_is_no_refusal(answer):
    assert not is_refusal(answer)


def test_every_check_is_explained():
    assert all(about and callable(is_so) for about, is_so in CHECKS.values())
