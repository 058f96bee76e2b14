"""The access token of a node. It comes from the environment, or from a file that only its owner can read."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from sumus.errors import ExperimentError, UsageError, unread
from sumus.storage.files import write_whole
from sumus.text import shell_word

VARIABLE = "SUMUS_NODE_TOKEN"
"""The environment variable that may hold the token."""
LEAST = 16
"""The minimum number of characters of a token."""


def access_token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """Read the token from a file or from the environment.

    Args:
        file: The file; if it does not exist, it is made, with a new token. None for the environment.
        environment: The environment variables.

    Returns:
        The token; None if no file is given and the environment has no token.
    """
    if file is None:
        return checked(environment[VARIABLE]) if environment.get(VARIABLE) else None
    if not file.exists():
        write_whole(file, f"{secrets.token_urlsafe(32)}\n".encode(), private=True)
    return checked(read_private(file))


def checked(token: str) -> str:
    """Check that a token is long enough and can be sent in an HTTP header, and return it."""
    if len(token) < LEAST or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"the access token is not accepted: it must have at least {LEAST} ASCII characters and no blanks; make a new one"
        )
    return token


def read_private(file: Path) -> str:
    """Read a secret from a file to which only its owner has access."""
    try:
        if file.stat().st_mode & 0o077:
            raise ExperimentError(
                f"{file} holds a secret, and others can read it: run `chmod 600 {shell_word(file)}`, and put a "
                "new secret into the file"
            )
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"the secret in {file} cannot be read: {unread(error)}") from error
