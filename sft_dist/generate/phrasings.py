"""How each task can be asked: several wordings per question, so that a model follows the request, not one string.

`FIRST` opens a conversation, `NEXT` continues it and refers to the turn before ("your answer") or to a list or
scene given earlier. Braces name facts of the task.
"""

from __future__ import annotations

FIRST: dict[str, tuple[str, ...]] = {
    "copy": ("Repeat these words: {words}", "Say this again: {words}", "Copy the list: {words}"),
    "reverse": (
        "Reverse these words: {words}",
        "Write the list backwards: {words}",
        "Turn this list around: {words}",
    ),
    "sort": ("Sort these words: {words}", "Order by the alphabet: {words}", "Write this list from a to z: {words}"),
    "capitals": ("Write in capitals: {words}", "Put this list in upper case: {words}", "Shout these words: {words}"),
    "count": ("How many words are in this list? {words}", "Count these words: {words}"),
    "position": (
        "What is the {position} word? {words}",
        "Give me the {position} word of this list: {words}",
        "Say only the {position} word: {words}",
    ),
    "member": ("Is {word} in this list? {words}", "Does this list have {word}? {words}"),
    "add": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "How much is {a} + {b}?",
        "I have {a} coins and get {b} more. How many do I have?",
    ),
    "largest": ("Which number is the largest? {numbers}", "Give me the largest of these: {numbers}"),
    "odd_one_out": ("Which word does not belong? {words}", "Find the odd one out: {words}"),
    "pick": ("Which of these are {category}? {words}", "Take only the {category}: {words}"),
    "opposites": ("What is the opposite of each word? {words}", "Write the opposites: {words}"),
    "look_up": ("{scene} What is {colour}?", "{scene} Which thing is {colour}?"),
    "hello": ("Hello, I am {person} and I like the {thing}.", "My name is {person}. I like the {thing}."),
    "list": ("Here is a list: {words}", "Remember this list: {words}"),
}

NEXT: dict[str, tuple[str, ...]] = {
    "copy": ("Repeat your answer.", "Say that again."),
    "reverse": ("Now reverse your answer.", "And backwards?"),
    "sort": ("Now sort your answer.", "And from a to z?"),
    "capitals": ("Now in capitals.", "Shout your answer."),
    "position": ("What is the {position} word?", "Say only the {position} word."),
    "count": ("How many words are in it?", "Count the words."),
    "member": ("Is {word} in the list?", "Does it have {word}?"),
    "look_up": ("What is {colour}?", "And which thing is {colour}?"),
    "name": ("What is my name?", "Who am I?"),
    "liking": ("What do I like?", "Which thing do I like?"),
}
