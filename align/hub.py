"""The Hugging Face Hub, for scripts that were asked to upload: tried before the work, one line when it fails."""

from align.errors import InputError
from align.models.guard import one_line

FAILURES = (OSError, ValueError)  # no login, no way there, no right to write; a name that cannot be one


def check_login(repository: str, token: str | None = None) -> None:
    """Raises an InputError where there is no Hub to upload to, or nobody who may."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi(token=token).whoami()
    except FAILURES as error:
        raise InputError(f"--push_to_hub: {repository}: {one_line(error)}") from None
