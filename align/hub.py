"""The Hugging Face Hub, for scripts that were asked to upload: tried before the work, one line when it fails."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from align.errors import InputError

FAILURES = (OSError, HfHubHTTPError, HFValidationError)  # no login, no way there, no right to write, no such name


def check_login(repository: str, token: str | None = None) -> None:
    """Raises an InputError where there is no Hub to upload to, or nobody who may."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi(token=token).whoami()
    except FAILURES as error:
        raise InputError(f"--push_to_hub: {repository}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
