"""Where checkpoints are: a folder that all nodes see, or an S3 store.

A checkpoint exists whole or not at all. It is written elsewhere and then moved into place; in a store the part
that completes it, the file itself or a sharded one's `.metadata`, comes last. So the newest one listed is the one
to resume from, whenever the run was killed, and no pointer to it is needed.
"""

from __future__ import annotations

from collections.abc import Callable

from botocore.exceptions import BotoCoreError, ClientError

from esm2_composer.checkpoints.local import LocalFolder
from esm2_composer.checkpoints.s3 import S3Folder
from esm2_composer.errors import StoreUnavailable, UserError, system_error
from esm2_composer.retry import Result, retry

Folder = LocalFolder | S3Folder


def open_folder(uri: str) -> Folder:
    """Raises UserError if the store's endpoint or profile is invalid."""
    try:
        return S3Folder(uri) if uri.startswith("s3://") else LocalFolder(uri)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"save_folder {uri}: {error}") from error


def damaged(folder: Folder, name: str, remedy: str) -> UserError:
    """For a file of a folder whose content is not what was written."""
    return UserError(f"save_folder {folder}: {name} is damaged; {remedy}")


def ask(folder: Folder, action: Callable[[], Result]) -> Result:
    """What `action` returns; waits for a store that does not answer.

    Raises:
        UserError: the folder cannot be used.
        TransientError: worth another start: the store is unreachable, or the disk is full or fails.
    """
    try:
        return retry(action, str(folder)) if isinstance(folder, S3Folder) else action()
    except StoreUnavailable:
        raise
    except OSError as error:
        raise system_error(f"save_folder {folder} cannot be written ({error.strerror})", error) from error
    except (BotoCoreError, ClientError) as error:
        raise UserError(f"save_folder {folder} cannot be read and written ({error})") from error
