"""The job's token: the secret that every process of a job has and nobody else.

It goes to child processes through a file that only its owner can read; the file's path is in an environment variable.
The token itself is never in a command line, a log, an event or on the wire. Read next: `handshake.py`, which uses it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ENVIRONMENT = "JAXSCALE_TOKEN_FILE"
"""Environment variable with the path of the token's file."""
SECRET_BYTES = 32


class TokenError(RuntimeError):
    """The token cannot be had, or its file is not safe. The message never shows the token."""


@dataclass(frozen=True)
class Token:
    """The secret. Printing it, or anything that holds it, shows nothing of it."""

    secret: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """Tells tokens apart and gives nothing of them away."""
        return hashlib.sha256(b"jaxscale job " + self.secret).hexdigest()[:16]


def new_token() -> Token:
    """A token of 256 random bits."""
    return Token(secrets.token_bytes(SECRET_BYTES))


def write_token(path: Path, token: Token) -> None:
    """Writes the token to a new file of mode 0600. Raises TokenError where something is there already; OSError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise TokenError(
            f"{path} is there already; a token is never written over: delete it or name another"
        ) from error
    try:
        with open(descriptor, "wb") as file:
            file.write(token.secret.hex().encode() + b"\n")
    except OSError:
        path.unlink(missing_ok=True)  # half a token would be taken for a damaged one later
        raise


def child_environment(path: Path) -> dict[str, str]:
    """What to add to a child's environment so that `read_token` finds the file."""
    return {ENVIRONMENT: str(path.absolute())}


def read_token(path: Path | None = None, environment: Mapping[str, str] = os.environ) -> Token:
    """The token in `path`, or where that is None in the file that the environment names. Raises TokenError.

    Refused: a link, something that is no plain file, a file of another user, and one that others may read or write.
    """
    if path is None:
        name = environment.get(ENVIRONMENT, "")
        if not name:
            raise TokenError(
                f"there is no job token: {ENVIRONMENT} is not set; set it to the path of the file with the job's token "
                "(`jaxscale launch` does; elsewhere mount it as a secret, mode 0600)"
            )
        path = Path(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise TokenError(f"the job token in {path} cannot be read: {reason}") from error
    try:
        _check(path, os.fstat(descriptor))
        text = os.read(descriptor, 4 * SECRET_BYTES)
    finally:
        os.close(descriptor)
    try:
        secret = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        # `from None` above all: the cause would quote the file's text
        raise TokenError(
            f"{path} holds no job token: that is one line of {2 * SECRET_BYTES} hexadecimal digits; it was cut short, "
            "or is another file"
        )
    return Token(secret)


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise TokenError(f"the job token in {path} is refused: that is no plain file")
    if status.st_uid != os.geteuid():
        raise TokenError(
            f"the job token in {path} is refused: the file belongs to user {status.st_uid}, this process to user "
            f"{os.geteuid()}; it has to be this user's own"
        )
    if status.st_mode & 0o077:
        raise TokenError(
            f"the job token in {path} is refused: others may use the file (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"make a new token, since this one may be known, or if it cannot be: chmod 600 {path}"
        )
