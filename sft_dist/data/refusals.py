"""How answers refuse, in several languages: one table of patterns, matched at the beginning of an answer.

Only the first 200 characters count: "I cannot" late in a story is no refusal. A match means that a person should look,
not that the answer is wrong; refusing may be what the data teaches on purpose. Written for this project after the
phrases that filters of public instruction sets look for (ShareGPT cleaning in FastChat; WildChat, Zhao et al., 2024).
"""

from __future__ import annotations

import re

_BEGINNING = 200  # characters

REFUSALS: dict[str, tuple[str, ...]] = {
    "English": (
        r"\bas an? (ai|artificial intelligence|(large )?language model)\b",
        r"\bi(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model)\b",
        r"\bi(?:'m| am) (?:very |so )?(?:sorry|afraid)\b.{0,40}\b(?:can(?:'t|not)|unable|not able|won't)\b",
        r"\bi (?:can(?:'t|not)|can not|am (?:not able|unable) to|won't|must decline to) "
        r"(?:assist|help|provide|fulfil|comply|answer|do that|generate|create|engage)",
        r"\bi do(?:n't| not) have (?:access|the ability|personal|feelings|the capability)",
        r"\bunfortunately,? i (?:can(?:'t|not)|am (?:not able|unable))\b",
    ),
    "Chinese": (
        r"作为(?:一个|一名|一款)?(?:人工智能|AI|大?语言模型|智能助手)",
        r"(?:对不起|抱歉|很遗憾).{0,15}(?:无法|不能|没办法)",
        r"我(?:无法|不能)(?:提供|帮助|回答|协助|满足|执行|访问|生成)",
    ),
    "Russian": (
        r"как (?:ии|искусственный интеллект|(?:большая )?языковая модель)",
        r"(?:извините|простите|к сожалению).{0,30}\bне (?:могу|способен|в состоянии|имею возможности)\b",
        r"\bя не могу (?:помочь|предоставить|выполнить|ответить|создать)",
    ),
    "Spanish": (
        r"\bcomo (?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje|asistente virtual)\b",
        r"\blo siento\b.{0,40}\bno puedo\b",
        r"\bno puedo (?:ayudar|proporcionar|responder|cumplir|generar|asistir)",
    ),
    "Portuguese": (
        r"\bcomo (?:uma? )?(?:ia|inteligência artificial|modelo de linguagem|assistente virtual)\b",
        r"\b(?:desculpe|sinto muito|lamento|infelizmente)\b.{0,40}\bnão (?:posso|consigo)\b",
        r"\bnão (?:posso|consigo) (?:ajudar|fornecer|responder|cumprir|gerar)",
    ),
    "French": (
        r"\ben tant (?:qu'ia|que modèle de langage|qu'intelligence artificielle)",
        r"\b(?:désolée?|malheureusement)\b.{0,40}\bje ne (?:peux|suis) pas\b",
    ),
    "German": (
        r"\bals (?:ki|künstliche intelligenz|sprachmodell)\b",
        r"\b(?:tut mir leid|leider)\b.{0,40}\b(?:kann ich|ich kann)\b.{0,20}\bnicht\b",
    ),
}

_ANY = re.compile("|".join(pattern for patterns in REFUSALS.values() for pattern in patterns), re.IGNORECASE)


def is_refusal(answer: str) -> bool:
    """Whether the answer begins like a refusal in a language of the table."""
    return _ANY.search(answer[:_BEGINNING].replace("’", "'").replace("\n", " ")) is not None
