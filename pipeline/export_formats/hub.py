"""An exported folder to a model hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError

from data_prep.command import ConfigError, RunError, one_line

WEIGHTS_AND_CONFIGS = ["*.safetensors", "*.onnx", "*.json"]


def check_hub(name: str) -> None:
    """Refuse, before anything is computed, what no hub would take.

    Raises:
        ConfigError: nobody is logged in, or the hub is switched off.
    """
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"--push_to_hub {name} needs the hub, and HF_HUB_OFFLINE is set; unset it, or push the "
            "folder later with `hf upload`"
        )
    if get_token() is None:
        raise ConfigError(
            f"--push_to_hub {name} needs a token with write access, and there is none; run "
            "`hf auth login` or set HF_TOKEN"
        )


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder in one commit to a model repository, which is created where it is missing.

    Weights and configurations of an earlier export that this one lacks are deleted there.

    Args:
        folder: of an export.
        name: USER/MODEL, or MODEL of the token's owner.
        private: for a repository that is created; one that exists has to be private already.

    Returns:
        The commit's address.

    Raises:
        ConfigError: no repository can have the name, or it is public although `private` is asked.
        RunError: the hub refused, or cannot be reached.
    """
    api = HfApi()
    try:
        # Not False: an organisation may have private as its default.
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        is_exposed = private and not api.model_info(repo).private
        if not is_exposed:
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Export {folder.name}",
                delete_patterns=WEIGHTS_AND_CONFIGS,
            )
            return str(commit.commit_url)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {name}: {one_line(error)}") from error
    except Exception as error:  # whatever hub and network may provoke
        raise RunError(
            f"{name} was not pushed to {api.endpoint} ({one_line(error)}); the export is whole in "
            f"{folder}: push it again, or with `hf upload`"
        ) from error
    raise ConfigError(
        f"--push_to_hub {name} exists and is public, so --private would not hide the model, and "
        "nothing was pushed; name another, or make it private first"
    )
