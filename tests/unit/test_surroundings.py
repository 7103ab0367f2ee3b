"""What a resume tells of libraries, threads and kernels that are not those of the checkpoint."""

from __future__ import annotations

import pytest

from sft_dist.surroundings import ABSENT, LIBRARIES, installed, warning_of_changes

NOW = {"torch": "2.13.0", "deepspeed": ABSENT, "threads": "2", "attention kernel": "sdpa"}


def test_installed_libraries_have_their_version_and_others_say_so() -> None:
    assert installed("torch")[0].isdigit()
    assert installed("no-such-library") == ABSENT
    assert all(installed(name) for name in LIBRARIES)


def test_each_change_is_named_with_both_values_on_one_line() -> None:
    before = NOW | {"torch": "2.12.0", "deepspeed": "0.19.8", "threads": "4"}
    assert warning_of_changes(before, NOW) == (
        "warning: not as when this checkpoint was written: torch 2.12.0 -> 2.13.0, deepspeed 0.19.8 -> not installed, "
        "threads 4 -> 2; bits may differ from here on"
    )


@pytest.mark.parametrize("before", [NOW, {}, {"torch": "2.13.0"}, NOW | {"no longer looked at": "1"}])
def test_the_same_and_what_was_not_recorded_are_not_told(before: dict[str, str]) -> None:
    assert warning_of_changes(before, NOW) is None
