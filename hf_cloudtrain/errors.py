"""Every exception this package raises.

CloudTrainError
├── ConfigurationError (ValueError)        an argument, a variable or a combination that cannot work
│   ├── JobFileError                       a job file with problems; all of them are told at once
│   └── MissingExtraError (ImportError)    a storage protocol whose packages are not installed
├── StorageError (OSError)                 a storage call failed, and a retry would not help
│   ├── ObjectNotFoundError (FileNotFoundError)
│   ├── ObjectTruncatedError               fewer bytes than were promised
│   ├── StoragePermissionError (PermissionError)
│   └── StorageUnavailableError            still failing after all retries: later may work
├── ManifestError (ValueError)             a record on storage or on disk that does not read as one
│   └── NewerFormatError                   written by a newer version of this package
├── CorruptCheckpointError                 files differ from what the manifest promises
├── NoCheckpointError                      asked for a checkpoint that does not exist
├── NoDatasetError                         asked for a dataset, or a version of one, that does not exist
├── NoJobError                             asked for a job that does not exist
├── RunHasCheckpointsError                 starting at step 0 on a run that already has checkpoints
├── RunCompleteError                       all steps are done, and the framework would do one more
├── PositionError (ValueError)             the checkpoint's position does not fit this configuration
├── NotCommittedError                      training ended and a checkpoint is not on storage yet
├── OvertakenError                         a newer attempt of this run has started
├── PreemptedError                         training was stopped because the machine goes; in notebooks
└── PeerError                              another process of this job failed; its message is carried

Besides there is PreemptedExit, a SystemExit: PreemptedError for scripts, of which nothing runs after the training.
"""

from __future__ import annotations


class CloudTrainError(Exception):
    """Base of every error of this package."""


class ConfigurationError(CloudTrainError, ValueError):
    """An argument, a variable or a combination of them that cannot work."""


class JobFileError(ConfigurationError):
    """A job file that cannot be run as it is: all of its problems, one a line, as 'job.yml:3: what is wrong'."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems, each with its file and line."""
        return tuple(str(self).splitlines())


class MissingExtraError(ConfigurationError, ImportError):
    """A storage protocol whose packages are not installed."""


class StorageError(CloudTrainError, OSError):
    """A storage call failed, and trying again would not help."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """The object, the folder or the bucket does not exist."""


class ObjectTruncatedError(StorageError):
    """The object has fewer bytes than were promised."""


class StoragePermissionError(StorageError, PermissionError):
    """The storage refused the credentials, or they do not allow this call."""


class StorageUnavailableError(StorageError):
    """The storage kept failing until the retries were used up; later it may work."""


class ManifestError(CloudTrainError, ValueError):
    """A record on storage or on disk that does not read as one."""


class NewerFormatError(ManifestError):
    """A record that a newer version of this package has written."""


class CorruptCheckpointError(CloudTrainError):
    """Files are missing, cut short or different from what the manifest promises."""


class NoCheckpointError(CloudTrainError):
    """Asked for a checkpoint that does not exist."""


class NoDatasetError(CloudTrainError):
    """Asked for a dataset, or a version of one, that does not exist."""


class NoJobError(CloudTrainError):
    """Asked for a job that does not exist."""


class RunHasCheckpointsError(CloudTrainError):
    """Training would start at step 0 on a run that already has checkpoints."""


class RunCompleteError(CloudTrainError):
    """The run has done all its steps, and the framework would do more of them."""


class PositionError(CloudTrainError, ValueError):
    """The checkpoint's position in data and schedule does not fit this configuration."""


class NotCommittedError(CloudTrainError):
    """Training ended, and a checkpoint that was saved is not on storage."""


class OvertakenError(CloudTrainError):
    """A newer attempt of the same run has started, so this one ends and writes nothing more."""


class PreemptedError(CloudTrainError):
    """Training was saved and stopped in a notebook, because the machine goes or somebody asked for it."""


class PreemptedExit(SystemExit):
    """Ends a script whose training was saved and stopped. The exit code is 75: try again later (sysexits.h)."""

    CODE = 75

    def __init__(self) -> None:
        super().__init__(self.CODE)


class PeerError(CloudTrainError):
    """Another process of this job failed; its error is named in the message."""
