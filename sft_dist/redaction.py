"""Keys and passwords do not leave a process by what it prints: libraries put them into their errors (URLs, headers).

Taken out are the values of variables whose names speak of a secret, and what has the public shape of one. All that goes
through Python's streams is covered: lines, warnings, tracebacks, also of threads, and log handlers that a library made
for these streams before. Not covered: what native code writes to descriptor 2 by itself, a key cut in two by two writes
(but for the lines of a private key), and values of fewer than 8 characters.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

SHAPES = {
    "a password in a URL": r"://[^/\s:@]*:[^/\s@]+@",
    "a signature in a URL": r"[?&](X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature|sig|access_token|token)=",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\bgh[opsur]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_GIVEN = r"(?<=[?&]sig=)[^&\s]+|(?<=_token=)[^&\s]+|(?<=[?&]token=)[^&\s]+|(?<=-Signature=)[^&\s]+|(?<=-Token=)[^&\s]+"
_BEARER = r"(?i:(?<=bearer )[\w.~+/=-]{8,})"
_PASSWORD = r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
_KEY_BEGIN, _KEY_END = SHAPES["a private key"], r"-----END [A-Z ]*PRIVATE KEY-----"
_KEY_BLOCK = rf"{_KEY_BEGIN}(?s:.*?)(?:{_KEY_END}|\Z)"
_OPEN_KEY = re.compile(rf"{_KEY_BEGIN}(?!(?s:.*){_KEY_END})")
_LONGEST_KEY = 256  # writes or lines: `print` makes two of each line, and 8192 bits take a hundred
_WHOLE = "|".join([_GIVEN, _BEARER, _PASSWORD, _KEY_BLOCK, *(SHAPES[name] for name in SHAPES if "URL" not in name)])
_SECRET_NAME = re.compile(
    r"(^|_)(KEY|TOKEN|SECRET|PASS|PWD|CREDENTIALS?|DSN)(_|$)|PASSW(OR)?D|APIKEY|CONNECTION_?STRING|DATABASE_URL",
    re.IGNORECASE,
)
_FOLDERS = ("PWD", "OLDPWD")  # the shell's
_SHORTEST = 8  # a shorter value would take ordinary words out of the lines
HIDDEN = "[hidden]"


class Redactor:
    """Text without the secrets of an environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {value for name, value in environment.items() if _is_secret(name, value)}
        longest_first = sorted(values, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), _WHOLE]))

    def __call__(self, text: str) -> str:
        return self._pattern.sub(HIDDEN, text)


def _is_secret(name: str, value: str) -> bool:
    if not _SECRET_NAME.search(name) or name.upper() in _FOLDERS or len(value) < _SHORTEST:
        return False
    return not (value.startswith("/") and os.path.exists(value))  # a key file's place


class _Redacted:
    """A text stream that takes secrets out of what is written; anything else it leaves to `stream`."""

    def __init__(self, stream: TextIO, redact: Redactor) -> None:
        self._stream, self._redact = stream, redact
        self._left_of_key = 0  # writes or lines that may still belong to a private key which has begun

    def write(self, text: str) -> int:
        told = self._after_key(text)
        if _OPEN_KEY.search(told):
            self._left_of_key = _LONGEST_KEY
        self._stream.write(self._redact(told))
        return len(text)

    def _after_key(self, text: str) -> str:
        """What of `text` comes after a private key that an earlier write began: the lines up to its END are hidden."""
        if self._left_of_key <= 0:
            return text
        if end := re.search(_KEY_END, text):
            self._left_of_key = 0
            return text[end.end() :]
        self._left_of_key -= max(1, text.count("\n"))
        return ""

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hiding_secrets() -> Iterator[None]:
    """What is printed meanwhile, to stdout and stderr, has lost the secrets that the environment holds now."""
    before, redact = (sys.stdout, sys.stderr), Redactor(os.environ)
    meanwhile = tuple(cast(TextIO, _Redacted(stream, redact)) for stream in before)
    sys.stdout, sys.stderr = meanwhile
    _move_handlers(before, meanwhile)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _move_handlers(meanwhile, before)


def _move_handlers(old: Sequence[TextIO], new: Sequence[TextIO]) -> None:
    """Log handlers keep the stream that was there when they were made: those of `old` ones get the new one."""
    known = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
    for handler in {handler for logger in (logging.root, *known) for handler in logger.handlers}:
        if not isinstance(handler, logging.StreamHandler):
            continue
        for stream, other in zip(old, new, strict=True):
            if handler.stream is stream:
                handler.setStream(other)
                break  # stdout and stderr may be one stream
