"""Keys and passwords do not leave a process by what it prints: libraries put them into their errors (URLs, headers).

Taken out are the values of variables whose names speak of a secret, and what has the public shape of one. All that goes
through Python's streams is covered: lines, warnings, tracebacks, also of threads. What native code writes to descriptor
2 by itself is not.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

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
_WHOLE = "|".join([_GIVEN, _BEARER, _PASSWORD, *(SHAPES[name] for name in SHAPES if "URL" not in name)])
_SECRET_NAME = re.compile(
    r"(^|_)(KEY|TOKEN|SECRET|PASS|PASSWD|PASSWORD|CREDENTIALS?|DSN)(_|$)|APIKEY|DATABASE_URL", re.IGNORECASE
)
_SHORTEST = 8  # a shorter value would take ordinary words out of the lines
HIDDEN = "[hidden]"


class Redactor:
    """Text without the secrets of an environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and len(value) >= _SHORTEST and not value.startswith("/")  # a key file's place
        }
        longest_first = sorted(values, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, longest_first), _WHOLE]))

    def __call__(self, text: str) -> str:
        return self._pattern.sub(HIDDEN, text)


class _Redacted:
    """A text stream that takes secrets out of what is written; anything else it leaves to `stream`."""

    def __init__(self, stream: TextIO, redact: Redactor) -> None:
        self._stream, self._redact = stream, redact

    def write(self, text: str) -> int:
        self._stream.write(self._redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hiding_secrets() -> Iterator[None]:
    """What is printed meanwhile, to stdout and stderr, has lost the secrets that the environment holds now."""
    before, redact = (sys.stdout, sys.stderr), Redactor(os.environ)
    sys.stdout, sys.stderr = (_Redacted(stream, redact) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
