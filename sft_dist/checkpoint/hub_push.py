"""`hub.push_to: owner/name`: the finished export on a model hub, through huggingface_hub.

Whether it can be done at all is asked before the first step; the upload comes after the export has been proven. An
upload that fails costs nothing but itself: the export is there, and the line that tells says how to send it later.
The token is huggingface_hub's own (HF_TOKEN, or what `hf auth login` stored); it is never read into a recipe or a log.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from sft_dist.config.schema import HubSection
from sft_dist.errors import ConfigError


def check_hub(hub: HubSection) -> None:
    """Raise ConfigError when an upload was asked for and cannot work from here."""
    if hub.push_to is None:
        return
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"hub.push_to={hub.push_to}: HF_HUB_OFFLINE is set: unset it, or leave hub.push_to out")
    if get_token() is None:
        raise ConfigError(f"hub.push_to={hub.push_to}: no token: set HF_TOKEN, or run `hf auth login`")


def push(export: Path, hub: HubSection, message: str) -> str:
    """Upload the folder; the line to tell, whether it worked or not."""
    assert hub.push_to is not None
    try:
        api = HfApi()
        api.create_repo(hub.push_to, private=hub.private, exist_ok=True)
        done = api.upload_folder(repo_id=hub.push_to, folder_path=export, commit_message=message)
    except Exception as error:  # of several HTTP libraries underneath; the run is finished whatever it is
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"warning: hub.push_to={hub.push_to}: not uploaded ({reason}); the export is in {export}: "
            f"hf upload {hub.push_to} {export}"
        )
    return f"uploaded to {hub.push_to}: {done.commit_url}"
