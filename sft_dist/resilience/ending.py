"""The end of a process that may have taken part in collectives."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from sft_dist.redaction import hiding_secrets


@contextmanager
def letting_go() -> Iterator[None]:
    """Free what the finished frames of an error inside and of its causes hold; their lines can still be printed.

    A DDP wrapper that lives on in a traceback when the process group is destroyed joins gloo's thread while it holds
    the interpreter lock, and hangs (seen on one of two ranks after a NaN, with torch 2.13).
    """
    try:
        yield
    except BaseException as error:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        gc.collect()
        raise


def run_and_end(main: Callable[[], int | None]) -> NoReturn:
    """Leave with what `main` returns (1 and its traceback if it raises) once all that was registered for the end has
    run and all output is out.

    Python's own end would race gloo's threads: one that drops its last tensor while the interpreter is being taken
    down asks for the interpreter lock, is unwound through C++ and aborts the process, after everything was done
    (seen in 1 of 12 two-process runs with torch 2.13; destroying the process group does not help, since device
    meshes keep it alive).
    """
    with hiding_secrets():
        code = exit_code_of(main)
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has left, or it is closed: nobody is left to tell
            stream.flush()
    os._exit(code)


def exit_code_of(main: Callable[[], int | None]) -> int:
    """What a process would leave with that does nothing but `main`; an error's traceback is printed."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as asked:
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
        return asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
