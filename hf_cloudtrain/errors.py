"""Every exception this package raises.

CloudTrainError
├── ConfigurationError (ValueError)        an argument, a variable or a combination that cannot work
│   ├── JobFileError                       a job file with problems; its message lists all of them
│   └── MissingExtraError (ImportError)    an extra of this package is needed and not installed
├── StorageError (OSError)                 a storage call failed, and a retry would not help
│   ├── ObjectNotFoundError (FileNotFoundError)
│   ├── ObjectTruncatedError               the object is shorter than its record says
│   ├── StoragePermissionError (PermissionError)
│   └── StorageUnavailableError            still failing after all retries; may succeed later
├── ManifestError (ValueError)             a record on storage or on disk cannot be read
│   └── NewerFormatError                   written by a newer version of this package
├── CorruptCheckpointError                 files differ from their manifest
├── NoCheckpointError                      the checkpoint does not exist
├── NoDatasetError                         the dataset, or this version of it, does not exist
├── NoJobError                             the job does not exist
├── RunHasCheckpointsError                 training would start at step 0 on a run that has checkpoints
├── RunCompleteError                       all steps are done, and the framework would train further
├── PositionError (ValueError)             the checkpoint's position does not fit this configuration
├── NotCommittedError                      training ended before a checkpoint was committed
├── OvertakenError                         a newer attempt of this run has started
├── PreemptedError                         training was saved and stopped by a preemption; in notebooks
└── PeerError                              another rank failed; the message contains its error

In scripts, PreemptedExit takes the place of PreemptedError: a SystemExit with the exit code 75.
"""

from __future__ import annotations


class CloudTrainError(Exception):
    """Base of every error of this package."""


class ConfigurationError(CloudTrainError, ValueError):
    """An argument, a variable or a combination of them that cannot work."""


class JobFileError(ConfigurationError):
    """A job file that cannot be run. The message lists all problems, one per line: 'job.yml:3: what is wrong'."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems, each with its file and line."""
        return tuple(str(self).splitlines())


class MissingExtraError(ConfigurationError, ImportError):
    """Packages are missing that an extra of this package installs, such as `hf_cloudtrain[s3]`."""


class StorageError(CloudTrainError, OSError):
    """A storage call failed, and a retry would not help."""


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """The object, the folder or the bucket does not exist."""


class ObjectTruncatedError(StorageError):
    """The object has fewer bytes than its record says."""


class StoragePermissionError(StorageError, PermissionError):
    """The storage refused the credentials, or they do not permit this call."""


class StorageUnavailableError(StorageError):
    """The storage failed until no retry was left; the call may succeed later."""


class ManifestError(CloudTrainError, ValueError):
    """A record on storage or on disk is damaged or has the wrong form."""


class NewerFormatError(ManifestError):
    """A record was written by a newer version of this package."""


class CorruptCheckpointError(CloudTrainError):
    """Files are missing, truncated or different from the manifest."""


class NoCheckpointError(CloudTrainError):
    """The checkpoint does not exist."""


class NoDatasetError(CloudTrainError):
    """The dataset, or this version of it, does not exist."""


class NoJobError(CloudTrainError):
    """The job does not exist."""


class RunHasCheckpointsError(CloudTrainError):
    """Training would start at step 0 on a run that already has checkpoints."""


class RunCompleteError(CloudTrainError):
    """The run has done all its steps, and the framework would train further."""


class PositionError(CloudTrainError, ValueError):
    """The position of the checkpoint in data and schedule does not fit this configuration."""


class NotCommittedError(CloudTrainError):
    """Training ended, and a saved checkpoint is not on storage."""


class OvertakenError(CloudTrainError):
    """A newer attempt of the same run has started, so this one stops and writes no more checkpoints."""


class PreemptedError(CloudTrainError):
    """Training in a notebook was saved and stopped, after a preemption notice or on request."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of the frames: the cell did what it was asked to do."""
        return [f"{type(self).__name__}: {self}"]


class PreemptedExit(SystemExit):
    """Ends a script whose training was saved and stopped. Exit code 75 means "try again later" (sysexits.h)."""

    CODE = 75

    def __init__(self) -> None:
        super().__init__(self.CODE)


class PeerError(CloudTrainError):
    """Another rank of this job failed; the message contains its error."""
