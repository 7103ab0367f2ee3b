"""Every error a user can meet, each with the process exit code it ends in.

    SftError                 1   (never raised itself)
    ├── ConfigError          2   usage or configuration
    ├── DataError           65   data unusable
    │   └── BadRecord       65   one record: file, line, byte, reason
    ├── CheckpointError     65   checkpoint unusable
    ├── CertificateError     2   model + backend + packing, or an export, cannot be proven right
    ├── NonFiniteError      70   loss or gradient norm is not a number
    ├── LockedError         73   the run folder belongs to another job
    ├── StorageError        74   disk full, read-only, vanished
    └── HardwareError       77   the same computation gave two results

Messages are one line: what (key, or file and line), the value, the rule, the remedy.
`assert` is kept for our own invariants.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_NONFINITE = 70
EXIT_HANG = 71
EXIT_LOCKED = 73
EXIT_STORAGE = 74
EXIT_STOPPED = 75
EXIT_NO_PROGRESS = 76
EXIT_HARDWARE = 77


class SftError(Exception):
    """Base of all errors that are reported as one line instead of a traceback."""

    exit_code = 1


class ConfigError(SftError):
    """A recipe, a flag or the environment asks for something that cannot be."""

    exit_code = EXIT_USAGE


class DataError(SftError):
    """The data as a whole cannot be trained on."""

    exit_code = EXIT_DATA


class BadRecord(DataError):
    """One record cannot be used; carries where it stands.

    `line` is 1-based, `byte` is the offset of the record's first byte in the decompressed file.
    """

    def __init__(self, reason: str, *, file: str = "", line: int = 0, byte: int = 0) -> None:
        self.reason, self.file, self.line, self.byte = reason, file, line, byte
        super().__init__(f"{file}:{line} (byte {byte}): {reason}" if file else reason)

    def stopping(self) -> BadRecord:
        """This record as the end of a preparation, with the way out."""
        reason = f"{self.reason}; mend it, or go on without such records: data.on_bad_record=skip"
        return BadRecord(reason, file=self.file, line=self.line, byte=self.byte)


class CheckpointError(SftError):
    """A checkpoint is missing, altered, or belongs to another run."""

    exit_code = EXIT_DATA


class CertificateError(SftError):
    """The start-up proof of boundaries, positions or loss failed, or that of an export."""

    exit_code = EXIT_USAGE


class NonFiniteError(SftError):
    """Loss or gradient norm became NaN or infinite; no update was applied."""

    exit_code = EXIT_NONFINITE


class LockedError(SftError):
    """Another live job holds the run folder."""

    exit_code = EXIT_LOCKED


class StorageError(SftError):
    """Writing failed: no space, read-only, or the file system went away."""

    exit_code = EXIT_STORAGE


class HardwareError(SftError):
    """Something that must be equal was not: between ranks, or between two passes over the same numbers."""

    exit_code = EXIT_HARDWARE
