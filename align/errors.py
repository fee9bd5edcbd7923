"""Wrong input ends in one clear line on standard error and exit code 2: align/cli.py."""


class InputError(Exception):
    """What the user gave cannot work. The message is one line: the flag or file, what it got, what to do."""


def check_seed(seed: int) -> None:
    """Refuses what numpy cannot be seeded with."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: got {seed}; give 0 to {2**32 - 1}")
