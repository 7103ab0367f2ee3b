"""Old checkpoints are deleted beside the training: a file system takes a while to give gigabytes back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from sft_dist.checkpoint.disk import storage_errors
from sft_dist.errors import StorageError


class Sweeper:
    """Deletes folders that have lost their names already, one after another. A crash leaves `.tmp-` folders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads: list[threading.Thread] = []
        self._errors: list[StorageError] = []

    def delete(self, path: Path) -> None:
        """Begin to delete the folder `path`."""
        thread = threading.Thread(target=self._delete, args=(path,), name="sft-sweeper", daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self) -> list[StorageError]:
        """Wait for all that was begun; what could not be deleted, told once."""
        while self._threads:
            self._threads.pop().join()
        errors, self._errors = self._errors, []
        return errors

    def _delete(self, path: Path) -> None:
        try:
            with storage_errors(self._folder):
                shutil.rmtree(path)
        except StorageError as error:
            self._errors.append(error)
