"""The CIFAR example: the reader refuses other pickles, the augmentation is reproducible, and the models are right."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.cifar_files import CLASSES, ROWS, array, content_of, names_of, python2, write_set

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cifar"
# Python 3.12 and later, where a data loader forks a process that has threads.
fork_is_fine = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture(autouse=True)
def example_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cifar_data() -> ModuleType:
    return importlib.import_module("cifar_data")


@pytest.fixture(params=CLASSES)
def dataset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with both datasets, generated, in the original layout."""
    folder = tmp_path / "data"
    for name in CLASSES:
        write_set(folder, name)
    return folder


@pytest.fixture(scope="session")
def real_cifar100(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared_data / "cifar" / "cifar-100-python.subset.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


class TestReader:
    def test_the_original_files_give_all_images_labels_and_names(self, cifar_data, data, dataset):
        train, test = (cifar_data.CifarDataset(dataset, data, train=train) for train in (True, False))
        files = 5 if dataset == "cifar10" else 1
        assert len(train) == ROWS * files
        assert len(test) == ROWS
        pixels, labels = content_of(dataset, files - 1)
        assert (train.images[-ROWS:].numpy() == pixels.reshape(-1, 3, 32, 32)).all()
        assert train.labels[-ROWS:] == labels
        assert cifar_data.label_names(dataset, data) == names_of(dataset)

    def test_the_data_path_can_be_the_folder_itself(self, cifar_data, data):
        folder = data / "cifar-100-python"
        one, other = (cifar_data.CifarDataset("cifar100", path) for path in (data, folder))
        assert torch.equal(one.images, other.images)

    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("keys", [str, str.encode])
    def test_files_that_python_3_has_rewritten_are_read_too(self, cifar_data, data, protocol, keys):
        pixels, labels = content_of("cifar100")
        content = {keys("data"): np.asfortranarray(pixels), keys("fine_labels"): labels}
        (data / "cifar-100-python" / "train").write_bytes(pickle.dumps(content, protocol))
        train = cifar_data.CifarDataset("cifar100", data)
        assert (train.images.numpy().reshape(ROWS, -1) == pixels).all()
        assert train.labels == labels

    @pytest.mark.slow
    def test_the_real_cifar100_equals_what_pickle_loads(self, cifar_data, real_cifar100):
        train = cifar_data.CifarDataset("cifar100", real_cifar100)
        with (real_cifar100 / "cifar-100-python" / "train").open("rb") as file:
            expected = pickle.load(file, encoding="latin1")
        assert (train.images.numpy().reshape(-1, 3072) == expected["data"]).all()
        assert train.labels == expected["fine_labels"]
        names = cifar_data.label_names("cifar100", real_cifar100)
        assert (names[0], names[-1]) == ("apple", "worm")
        # The constants are those of all 50,000 images; this subset has 10,000.
        for found, known in (
            (train.images.float().mean((0, 2, 3)) / 255, train._mean),
            (train.images.float().std((0, 2, 3)) / 255, train._std),
        ):
            assert (found - known.flatten()).abs().max() < 0.003

    def test_a_missing_file_is_named_with_its_download_and_the_option(self, cifar_data, data, dataset):
        folder = cifar_data.KINDS[dataset].folder
        (data / folder / cifar_data.KINDS[dataset].test_file).unlink()
        cifar_data.CifarDataset(dataset, data)
        with pytest.raises(FileNotFoundError, match=rf"{folder}.*'test.*cs.toronto.edu.*tar.gz.*--data-path"):
            cifar_data.CifarDataset(dataset, data, train=False)


class TestDistrust:
    """A pickle can call any function, and a damaged one can hold any value."""

    @pytest.mark.parametrize(
        ("module", "name", "argument"),
        [
            ("os", "system", "touch owned"),
            ("posix", "system", "touch owned"),
            ("builtins", "eval", "open('owned', 'w')"),
            ("builtins", "exec", "open('owned', 'w')"),
            ("pathlib", "Path", "owned"),
            ("numpy", "load", "owned"),
            ("numpy", "dtype.__class__", "owned"),
            ("numpy.core.multiarray", "fromfile", "owned"),
            ("builtins", "getattr", "owned"),
        ],
    )
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_a_pickle_that_refers_to_another_name_is_refused_and_runs_nothing(
        self, cifar_data, data, tmp_path, module, name, argument, protocol
    ):
        path = data / "cifar-100-python" / "train"
        where = f"c{module}\n{name}\n".encode()
        if protocol == 4:
            where = (
                b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"
            )
        call = where + python2(argument) + b"\x85R"
        path.write_bytes(bytes([0x80, protocol]) + b"}" + python2("data") + call + b"s.")
        with pytest.raises(cifar_data.CifarFileError, match=rf"'{path}'.*'{module}.{name}'"):
            cifar_data.CifarDataset("cifar100", data)
        assert not (tmp_path / "owned").exists()

    def test_the_attack_of_this_test_works_on_plain_pickle(self, tmp_path):
        pickle.loads(b"\x80\x02cos\nsystem\n" + python2("touch owned") + b"\x85R.")
        assert (tmp_path / "owned").exists()

    def test_the_unpickler_provides_no_code_of_numpy(self, cifar_data):
        for replacement in cifar_data.CarefulUnpickler.REPLACEMENTS.values():
            assert replacement.__module__ == "cifar_data"

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
    def test_a_truncated_file_is_named(self, cifar_data, data, dataset, share):
        path = data / cifar_data.KINDS[dataset].folder / cifar_data.KINDS[dataset].train_files[-1]
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(
            cifar_data.CifarFileError, match=rf"'{path}'.*Download and unpack https://.*tar.gz again"
        ):
            cifar_data.CifarDataset(dataset, data)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda pixels, labels: {"data": pixels[:, :-1], "fine_labels": labels}, r"shape \(40, 3071\)"),
            (
                lambda pixels, labels: {"data": pixels.reshape(-1), "fine_labels": labels},
                r"shape \(122880,\)",
            ),
            (lambda pixels, labels: {"data": pixels[:0], "fine_labels": []}, "list of 0 class ids"),
            (lambda pixels, labels: {"data": pixels, "fine_labels": labels[:-1]}, "list of 40 class ids"),
            (lambda pixels, labels: {"data": pixels, "fine_labels": [*labels[:-1], 100]}, "from 0 to 99"),
            (lambda pixels, labels: {"data": pixels, "fine_labels": [*labels[:-1], -1]}, "from 0 to 99"),
            (lambda pixels, labels: {"data": pixels, "fine_labels": [*labels[:-1], "7"]}, "from 0 to 99"),
            (lambda pixels, labels: {"data": pixels, "fine_labels": [*labels[:-1], True]}, "from 0 to 99"),
            (lambda pixels, labels: {"data": pixels, "labels": labels}, "'fine_labels'"),
            (lambda pixels, labels: {"data": pixels.tolist(), "fine_labels": labels}, "no array 'data'"),
            (lambda pixels, labels: {"fine_labels": labels}, "no array 'data'"),
            (
                lambda pixels, labels: {"data": pixels.astype("i2"), "fine_labels": labels},
                "not an array of bytes",
            ),
            (
                lambda pixels, labels: {"data": pixels.astype("O"), "fine_labels": labels},
                "not an array of bytes",
            ),
            (lambda pixels, labels: [pixels, labels], "contains a list"),
        ],
    )
    def test_content_that_is_not_images_and_class_ids_is_named(self, cifar_data, data, change, problem):
        path = data / "cifar-100-python" / "train"
        path.write_bytes(pickle.dumps(change(*content_of("cifar100")), protocol=4))
        with pytest.raises(cifar_data.CifarFileError, match=rf"'{path}'.*{problem}"):
            cifar_data.CifarDataset("cifar100", data)

    @pytest.mark.parametrize(
        ("stored", "problem"),
        [
            (array((2**20, 3072), b"abc"), "has 3 bytes, which does not match its shape"),
            (array((-1, -3), b"abc"), "has 3 bytes, which does not match its shape"),
            (array((1, 3), b"abc", code="V1"), "not an array of bytes"),
            (array((1, 8), bytes(8), code="O"), "not an array of bytes"),
            (b"cnumpy\nndarray\n)R", "not an array of bytes"),
            (b"cnumpy\nndarray\n)RJ\1\0\0\0b", "not an array of bytes"),
        ],
    )
    def test_an_array_with_a_wrong_description_is_refused(self, cifar_data, data, stored, problem):
        path = data / "cifar-100-python" / "train"
        path.write_bytes(b"\x80\x02}" + python2("data") + stored + b"s.")
        with pytest.raises(cifar_data.CifarFileError, match=rf"'{path}'.*{problem}"):
            cifar_data.CifarDataset("cifar100", data)

    @pytest.mark.parametrize("body", [b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", b"\x80\x02U\x01aQ.", b"Pa\n."])
    def test_a_wrong_length_or_an_external_reference_is_refused(self, cifar_data, data, body):
        path = data / "cifar-100-python" / "train"
        path.write_bytes(body)
        with pytest.raises(cifar_data.CifarFileError, match=f"'{path}'"):
            cifar_data.CifarDataset("cifar100", data)

    def test_a_file_that_is_too_large_is_not_read_into_memory(self, cifar_data, data):
        path = data / "cifar-100-python" / "train"
        os.truncate(path, cifar_data.LARGEST_FILE + 1)
        with pytest.raises(cifar_data.CifarFileError, match=r"is larger than \d+ bytes"):
            cifar_data.CifarDataset("cifar100", data)

    @pytest.mark.parametrize("names", [["a"] * 99, [1] * 100, "a" * 100, None])
    def test_class_names_that_are_not_texts_are_refused(self, cifar_data, data, names):
        (data / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
        with pytest.raises(cifar_data.CifarFileError, match="list of 100 names"):
            cifar_data.label_names("cifar100", data)


class TestAugmentation:
    def test_an_image_is_shifted_by_up_to_4_pixels_and_mirrored_at_random(self, cifar_data, data):
        plain = cifar_data.CifarDataset("cifar100", data)
        train = cifar_data.CifarDataset("cifar100", data, augment=True)
        black = -(train._mean / train._std)
        border = black.expand(3, 40, 40).clone()
        found: dict[tuple[int, int, bool], int] = {}
        for epoch in range(50):
            train.set_epoch(epoch)
            for index in range(ROWS):
                border[:, 4:36, 4:36] = plain[index][0]
                key = _find(train[index][0], border)
                found[key] = found.get(key, 0) + 1
        assert len(found) > 0.99 * 9 * 9 * 2  # 2,000 draws of 162
        mirrored = sum(count for key, count in found.items() if key[2])
        assert 0.45 < mirrored / sum(found.values()) < 0.55

    def test_it_depends_only_on_seed_epoch_and_index(self, cifar_data, data):
        def images(seed: int, epoch: int) -> torch.Tensor:
            train = cifar_data.CifarDataset("cifar100", data, augment=True, seed=seed)
            train.set_epoch(epoch)
            torch.rand(epoch)  # the global random state has no effect
            order = range(ROWS) if epoch else reversed(range(ROWS))
            return torch.stack([image for _, image in sorted((index, train[index][0]) for index in order)])

        first = images(0, 3)
        assert torch.equal(first, images(0, 3))
        assert not torch.equal(first, images(0, 4))
        assert not torch.equal(first, images(1, 3))

    @fork_is_fine
    @pytest.mark.parametrize("persistent", [False, True])
    def test_workers_see_the_same_images_as_one_process_in_each_epoch(self, cifar_data, data, persistent):
        train = cifar_data.CifarDataset("cifar100", data, augment=True)
        loader = DataLoader(train, 8, num_workers=2, persistent_workers=persistent)
        for epoch in (0, 1):
            train.set_epoch(epoch)
            seen = torch.cat([images for images, _ in loader])
            assert torch.equal(seen, torch.stack([train[index][0] for index in range(ROWS)]))

    def test_the_normalisation_can_be_that_of_a_model(self, cifar_data, data):
        one, half = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
        test = cifar_data.CifarDataset("cifar10", data, train=False, mean=half, std=one)
        assert torch.allclose(test[0][0] + 0.5, test.images[0] / 255)


class TestModels:
    @pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "vit-tiny", "small"])
    def test_each_classifies_small_images_without_drawing_random_numbers(self, name):
        model = importlib.import_module("cifar_models").make_model(name, 100)
        before = torch.get_rng_state()
        with torch.no_grad():
            logits = model.train()(torch.zeros(2, 3, 32, 32)).logits
        assert logits.shape == (2, 100)
        assert torch.equal(torch.get_rng_state(), before)
        assert not [part for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.p]

    def test_a_resnet_keeps_32_pixels_up_to_its_first_stage(self):
        model = importlib.import_module("cifar_models").make_model("resnet18", 10)
        assert model.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)

    @pytest.mark.parametrize("name", ["vit-tiny", "small"])
    def test_from_pretrained_loads_what_finetune_trains(self, tmp_path, name):
        models = importlib.import_module("cifar_models")
        assert name in models.FROM_CONFIG
        model = models.make_model(name, 10)
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def _find(image: torch.Tensor, border: torch.Tensor) -> tuple[int, int, bool]:
    """Return the position of the image in the padded original, and whether it is mirrored."""
    for mirrored in (False, True):
        plain = image.flip(-1) if mirrored else image
        for down in range(9):
            for right in range(9):
                if torch.equal(plain, border[:, down : down + 32, right : right + 32]):
                    return down, right, mirrored
    raise AssertionError("the image is not a crop of the original")
