"""Tasks, scripts and languages of instructions."""

import pytest

from sft_dist.data.coverage import language_of, script_of, task_of


@pytest.mark.parametrize(
    ("instruction", "task"),
    [
        ("Please write a short story about a cat.", ("write", "story")),
        ("Could you kindly give me three tips for staying healthy?", ("give", "tips")),
        ("Generate a list of ten items", ("generate", "list")),
        ("Rewrite the following sentence using active voice.", ("rewrite", "sentence")),
        ("Given the text below, summarize it.", ("summarize", "")),
        ("Come up with a name for a shop.", ("come", "name")),
        ("What is the capital of France?", ("what", "capital")),
        ("How can I improve my health?", ("how", "health")),
        ("Explain why the sky is blue.", ("explain", "")),
        ("Translate: le chat", ("translate", "")),
        ("The following text is long.", None),
        ("Напиши рассказ о коте.", None),
        ("写一个故事。", None),
        ("COVID 疫情期间的安全措施", None),
        ("That's great!", None),
        ("Thanks for the help.", None),
        ("Décrivez le château.", ("décrivez", "château")),
        ("", None),
        ("12 + 7", None),
    ],
)
def test_tasks_by_the_rule(instruction, task):
    assert task_of(instruction) == task


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Where is the station? Где?", "Latin"),
        ("Где вокзал?", "Cyrillic"),
        ("车站在哪里？", "Han"),
        ("駅はどこですか", "Japanese"),
        ("역이 어디예요", "Hangul"),
        ("أين المحطة", "Arabic"),
        ("1 + 2 = 3 😀", "none"),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Where can I find the nearest railway station in this town?", "en"),
        ("Где находится ближайшая железнодорожная станция в этом городе?", "ru"),
        ("请问这个城市最近的火车站在哪里？", "zh"),
        ("¿Dónde está la estación de tren más cercana en esta ciudad?", "es"),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language
