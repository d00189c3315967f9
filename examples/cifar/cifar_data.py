"""Read CIFAR-10 and CIFAR-100 from the original files, without torchvision and without trusting the pickles.

The files of https://www.cs.toronto.edu/~kriz/cifar.html are pickles, and a pickle can call any function. This reader accepts only
the names that an array needs, and replaces them with classes of its own that store their arguments: no code of numpy or of the
standard library runs.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

SIZE = 32
"""Height and width of an image, in pixels."""
PADDING = 4
"""Maximum shift of the crop in pixels: He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2."""
LARGEST_FILE = 256 * 1024**2
"""Bytes; the largest original file has 155 MB."""


@dataclass(frozen=True)
class Kind:
    """The differences between the two datasets."""

    num_classes: int
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    labels_key: str
    names_file: str
    names_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# mean and std of each colour over the 50,000 training images, on a scale from 0 to 1.
KINDS = {
    "cifar10": Kind(
        num_classes=10,
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test_file="test_batch",
        labels_key="labels",
        names_file="batches.meta",
        names_key="label_names",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Kind(
        num_classes=100,
        folder="cifar-100-python",
        train_files=("train",),
        test_file="test",
        labels_key="fine_labels",
        names_file="meta",
        names_key="fine_label_names",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


class CifarDataset(Dataset):
    """Images as normalised (3, 32, 32) float tensors, each with its class id.

    With `augment`, an image is shifted by up to 4 pixels and mirrored at random. The augmentation depends only on the seed, the
    epoch and the index of the image, so a resumed run sees the same images as an uninterrupted one, with any number of workers.

    Args:
        dataset: "cifar10" or "cifar100".
        data_path: the folder with the original files, or its parent.
        train: the training images, or else the test images.
        augment: shift and mirror, see above.
        seed: of the augmentation.
        mean: of each colour, from 0 to 1; None: the mean of the training images.
        std: the same for the standard deviation.

    Raises:
        FileNotFoundError: a file is missing; the message says where to download it.
        CifarFileError: a file is damaged or is not an original file.

    Example:
        >>> train = CifarDataset("cifar10", "data", augment=True)
        >>> train.set_epoch(1)
        >>> image, label = train[0]
    """

    def __init__(
        self,
        dataset: str,
        data_path: str | Path,
        *,
        train: bool = True,
        augment: bool = False,
        seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        kind = KINDS[dataset]
        names = kind.train_files if train else (kind.test_file,)
        parts = [read_images(find_file(kind, data_path, name), kind) for name in names]
        self.images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        self.labels = [label for _, labels in parts for label in labels]
        self._mean, self._std = (
            torch.tensor(given or default).view(3, 1, 1)
            for given, default in ((mean, kind.mean), (std, kind.std))
        )
        self._augment = augment
        self._seed = seed
        # Shared memory: persistent workers have copies of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; call it before you create the iterator of an epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self._augment:
            chance = np.random.default_rng((self._seed, int(self._epoch), index))
            image = shifted(image, *chance.integers(0, 2 * PADDING + 1, size=2))
            if chance.integers(2):
                image = image.flip(-1)
        return (image.float() / 255 - self._mean) / self._std, self.labels[index]


class CifarFileError(ValueError):
    """A file is damaged or is not an original file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"'{path}' is not an original CIFAR file: {problem}. Download and unpack {home(path.parent.name)} again."
        )


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Return a crop of the image after padding it with 4 black pixels."""
    return pad(image, (PADDING,) * 4)[:, down : down + SIZE, right : right + SIZE]


def label_names(dataset: str, data_path: str | Path) -> list[str]:
    """Return the names of the classes, by class id."""
    kind = KINDS[dataset]
    path = find_file(kind, data_path, kind.names_file)
    names = read(path).get(kind.names_key)
    if not isinstance(names, list) or [type(name) for name in names] != [str] * kind.num_classes:
        raise CifarFileError(path, f"'{kind.names_key}' is not a list of {kind.num_classes} names")
    return names


def find_file(kind: Kind, data_path: str | Path, name: str) -> Path:
    for folder in (Path(data_path), Path(data_path, kind.folder)):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"Neither '{data_path}' nor '{Path(data_path, kind.folder)}' contains '{name}'. Unpack {home(kind.folder)} "
        "and pass that folder or its parent as --data-path."
    )


def home(folder: str) -> str:
    known = {"cifar-10-batches-py": "cifar-10-python", "cifar-100-python": "cifar-100-python"}
    base = "https://www.cs.toronto.edu/~kriz/"
    return f"{base}{known[folder]}.tar.gz" if folder in known else f"{base}cifar.html"


def read_images(path: Path, kind: Kind) -> tuple[np.ndarray, list[int]]:
    """Return the images as uint8 (number, 3, 32, 32), and their labels."""
    content = read(path)
    images, labels = content.get("data"), content.get(kind.labels_key)
    if not isinstance(images, StoredArray):
        raise CifarFileError(path, "it contains no array 'data'")
    array = images.array(path)
    if array.ndim != 2 or array.shape[1] != 3 * SIZE * SIZE:
        raise CifarFileError(path, f"'data' has the shape {array.shape}, not one row of 3072 bytes per image")
    if not isinstance(labels, list) or len(labels) != len(array) or not labels:
        raise CifarFileError(path, f"'{kind.labels_key}' is not a list of {len(array)} class ids")
    if any(type(label) is not int or not 0 <= label < kind.num_classes for label in labels):
        raise CifarFileError(
            path,
            f"'{kind.labels_key}' contains values that are not class ids from 0 to {kind.num_classes - 1}",
        )
    return array.reshape(-1, 3, SIZE, SIZE), labels


def read(path: Path) -> dict[str, Any]:
    """Return the dictionary in an original file. Its arrays are StoredArray objects."""
    if path.stat().st_size > LARGEST_FILE:
        raise CifarFileError(path, f"it is larger than {LARGEST_FILE} bytes")
    # A damaged pickle can raise almost any exception, for example MemoryError from a wrong length.
    try:
        content = CarefulUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:
        raise CifarFileError(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise CifarFileError(path, f"it contains a {type(content).__name__}, not a dictionary")
    # Files that Python 3 has rewritten can have bytes as keys.
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}


class StoredArray:
    """Replaces `numpy.ndarray`: stores what the pickle says about it, unchecked."""

    def __init__(self, *_: object) -> None:
        self._state: Any = None

    def __setstate__(self, state: object) -> None:
        self._state = state

    def array(self, path: Path) -> np.ndarray:
        """Return the array after checking that it holds bytes, as many as its shape says."""
        match self._state:
            case (int(), tuple(shape), StoredType(code="u1"), bool(by_columns), str() | bytes() as raw):
                data = raw.encode("latin1") if isinstance(raw, str) else raw
            case _:
                raise CifarFileError(path, "'data' is not an array of bytes")
        if any(type(length) is not int or length < 0 for length in shape) or np.prod(
            shape, dtype=object
        ) != len(data):
            raise CifarFileError(
                path, f"'data' has {len(data)} bytes, which does not match its shape {shape}"
            )
        # A copy, because torch.from_numpy warns about read-only memory.
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C").copy()


class StoredType:
    """Replaces `numpy.dtype`."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore the byte order and the like, which single bytes do not have."""


def as_latin1(text: str, encoding: str) -> bytes:
    """Replaces `_codecs.encode`, with which Python 3 writes bytes into pickles of protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"its bytes are encoded as '{encoding}', not 'latin1'")
    return text.encode("latin1")


class CarefulUnpickler(pickle.Unpickler):
    """Refuses all names except those that an array needs."""

    REPLACEMENTS: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): StoredArray,
        ("numpy._core.multiarray", "_reconstruct"): StoredArray,  # as numpy 2 writes it
        ("numpy", "ndarray"): StoredArray,
        ("numpy", "dtype"): StoredType,
        ("_codecs", "encode"): as_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.REPLACEMENTS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to '{module}.{name}', which image data does not need; do not load this file with other tools"
            ) from None

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object outside the file: {pid!r}")
