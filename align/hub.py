"""The Hugging Face Hub, for scripts that upload: they try their login before the work."""

from align.errors import InputError, one_line

FAILURES = (OSError, ValueError)  # no login, no connection, no right to write; an impossible name


def check_login(repository: str, token: str | None = None) -> None:
    """Raises an InputError where the Hub is not reached, or this user may not write to it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi(token=token).whoami()
    except FAILURES as error:
        raise InputError(f"--push_to_hub: {repository}: {one_line(error)}") from None
