"""Errors a user can cause or meet, each with the exit code of the process it ends.

Every message says what was found (value, URL), what was expected, and how to fix it, on one line.
"""

from __future__ import annotations


class CvdistError(Exception):
    """The parent of every error below; `exit_code` is what the process returns to its shell."""

    exit_code = 1


class ConfigError(CvdistError):
    """A setting, an argument or a URL cannot be used."""

    exit_code = 80


class DataError(CvdistError):
    """Images, shards or a manifest are missing, damaged or not what they claim to be."""

    exit_code = 81


class StorageError(CvdistError):
    """A file system did not do what was asked, or did not answer in time."""

    exit_code = 82


class NotFoundError(StorageError):
    """A file or directory is not there."""


class AlreadyExistsError(StorageError):
    """A target is there already, and nobody asked to overwrite it."""


class CheckpointError(CvdistError):
    """A checkpoint is damaged, missing, or belongs to another model."""

    exit_code = 83


class SyncError(CvdistError):
    """Ranks that should be identical are not, or another rank failed."""

    exit_code = 84


class NonFiniteError(CvdistError):
    """The loss is not a number."""

    exit_code = 87
