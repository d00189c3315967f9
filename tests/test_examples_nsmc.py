"""The NSMC example reads reviews, trains with both scripts, and labels sentences with the best model."""

import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ElectraConfig,
    ElectraForPreTraining,
)

from hf_cloudtrain.tracking.history import read_history
from tests.conftest import missing
from tests.integration._serve import Served
from tests.integration._zygote import Zygote
from tests.unit.cli.terminal import answer

EXAMPLE = Path(__file__).parents[1] / "examples" / "nsmc"
GOOD, BAD = ("최고", "재밌어요", "감동", "꿀잼"), ("최악", "지루해요", "실망", "노잼")
COMMON = ("영화", "배우", "정말", "너무", "스토리가", "연기", "ㅋㅋㅋㅋ", "...", "OST", "10점")
TINY = {"train": 160, "test": 40}
FAST = ["--learning_rate", "2e-3"]
Metrics = dict[str, float]
_TRAINED: dict[str, tuple[Path, Metrics]] = {}
STEPS_AN_EPOCH = 20
"""Of TINY: 153 training reviews (2 are empty, 5 are for validation), 8 in a step."""


@pytest.fixture(autouse=True)
def _quiet_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # monkeypatch.syspath_prepend would also touch pkg_resources, which warns.
    monkeypatch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that sums have one order
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def nsmc_data() -> ModuleType:
    return importlib.import_module("nsmc_data")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder with generated reviews in the form of the original files; some are empty."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, count in TINY.items():
        _write_raw(folder / f"ratings_{split}.txt", _generated(count, seed=count))
    return folder


@pytest.fixture
def whole(
    reviews: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Metrics]:
    """An uninterrupted training by `trainer` or `loop`, `machine-1` and `whole` in this folder; trained once."""

    def once(way: str) -> Metrics:
        if way not in _TRAINED:
            folder = tmp_path_factory.mktemp(way)
            train = _by_trainer if way == "trainer" else _by_loop
            _TRAINED[way] = folder, train(reviews, folder / "machine-1", folder / "whole")
        folder, metrics = _TRAINED[way]
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        return metrics

    return once


@pytest.fixture
def real_reviews(shared_data: Path) -> Path:
    folder = shared_data / "nsmc"
    if not folder.is_dir():
        missing(f"no data at {folder}")
    return folder


class TestCleaning:
    @pytest.mark.parametrize(
        ("text", "cleaned"),
        [
            ("최고ㅋㅋㅋㅋㅋㅋ", "최고ㅋㅋ"),
            ("와아아아아!!!!!!", "와아아!!"),
            ("ㅠㅠ ㅎㅎ", "ㅠㅠ ㅎㅎ"),
            ("굿굿", "굿굿"),
            ("좋다.....   좋아  ", "좋다.. 좋아"),
            ("GOOD Movie", "good movie"),
            ("별점 10점, 5/5 (강추)", "별점 10점, 5/5 (강추)"),
            ("사랑♥♥♥♥★ 漢字 그리고 ﷽", "사랑♥♥★ 그리고"),
            ("\u110e\u116c\u1100\u1169", "최고"),  # decomposed, as some systems write it
            ("줄\t바꿈\u3000공백\x00", "줄 바꿈 공백"),
            ("漢字 ", ""),
            ("", ""),
        ],
    )
    def test_keeps_what_expresses_a_mood_and_shortens_repetitions(self, nsmc_data, text, cleaned):
        assert nsmc_data.clean(text) == cleaned
        assert nsmc_data.clean(cleaned) == cleaned
        tokenizer = _make_tokenizer(["영화"])
        assert tokenizer.backend_tokenizer.normalizer.normalize_str(text) == cleaned

    def test_the_tokenizer_cleans_real_reviews_as_the_function_does(self, nsmc_data, real_reviews):
        normalizer = _make_tokenizer(["영화"]).backend_tokenizer.normalizer
        texts = nsmc_data.load_file(real_reviews, "test")["document"][:3000]
        assert [normalizer.normalize_str(text) for text in texts] == [nsmc_data.clean(text) for text in texts]


class TestReading:
    def test_raw_files_and_parquet_give_equal_rows(self, nsmc_data, tmp_path):
        rows = [("7", '그는 "최고"', 1), ("8", "", 0), ("9", "NA, null 'x\u2028y", 1), ("10", " 끝 ", 0)]
        _write_raw(tmp_path / "raw" / "ratings_train.txt", rows)
        (tmp_path / "parquet").mkdir()
        for part, some in (("00000", rows[:2]), ("00001", rows[2:])):
            columns = dict(zip(nsmc_data.COLUMNS, zip(*some, strict=True), strict=True))
            columns["document"] = [text or None for text in columns["document"]]
            columns["id"] = [int(number) for number in columns["id"]]
            shard = tmp_path / "parquet" / f"train-{part}-of-00002.parquet"
            datasets.Dataset.from_dict({"label": columns["label"], **columns}).to_parquet(shard)
        found = [nsmc_data.load_file(tmp_path / form, "train") for form in ("raw", "parquet")]
        assert found[0].features == found[1].features
        assert found[0].to_list() == found[1].to_list()
        assert [tuple(row.values()) for row in found[0].to_list()] == rows

    def test_windows_line_endings_are_removed(self, nsmc_data, tmp_path):
        (tmp_path / "ratings_test.txt").write_bytes("id\tdocument\tlabel\r\n1\t좋다\t1\r\n".encode())
        assert nsmc_data.load_file(tmp_path, "test").to_list() == [
            {"id": "1", "document": "좋다", "label": 1}
        ]

    @pytest.mark.parametrize("line", ["3\t하나", "3\t하나\t2", "3\t하\t나\t1", ""])
    def test_an_invalid_line_is_named_with_its_number(self, nsmc_data, tmp_path, line):
        path = tmp_path / "ratings_train.txt"
        path.write_text(f"id\tdocument\tlabel\n1\t좋다\t1\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"ratings_train.txt' line 3 is not"):
            nsmc_data.load_file(tmp_path, "train")

    def test_a_folder_without_reviews_raises_an_error_that_names_the_files(self, nsmc_data, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"'ratings_train.txt' nor 'train\*.parquet'.*--data_dir"):
            nsmc_data.load_splits(tmp_path)

    def test_empty_reviews_are_dropped_from_training_but_not_from_the_test(self, nsmc_data, reviews):
        splits = nsmc_data.load_splits(reviews)
        assert [len(rows) for rows in splits] == [153, 5, TINY["test"]]
        assert not {"", "漢字"} & {*splits.train["document"], *splits.validation["document"]}
        assert {"", "漢字"} < {*splits.test["document"]}

    def test_validation_and_training_reviews_are_disjoint(self, nsmc_data, reviews):
        splits = nsmc_data.load_splits(reviews)
        assert not set(splits.train["id"]) & set(splits.validation["id"])

    def test_a_subset_depends_on_the_seed(self, nsmc_data, reviews):
        first, again, other = (nsmc_data.load_splits(reviews, subset=60, seed=seed) for seed in (1, 1, 2))
        assert [len(rows) for rows in first] == [58, 2, 20]
        assert [rows.to_list() for rows in first] == [rows.to_list() for rows in again]
        assert first.train["id"][:] != other.train["id"][:]

    def test_one_training_review_is_not_enough(self, nsmc_data, reviews):
        with pytest.raises(ValueError, match=r"1 training reviews; at least two"):
            nsmc_data.load_splits(reviews, subset=1)

    @pytest.mark.slow
    def test_the_real_files_hold_150000_and_50000_reviews(self, nsmc_data, real_reviews):
        splits = nsmc_data.load_splits(real_reviews)
        empty = 150_000 - len(splits.train) - len(splits.validation)
        assert 5 <= empty <= 30
        assert len(splits.test) == 50_000


class TestOrder:
    LENGTHS = tuple(random.Random(3).choices(range(3, 61), k=1003))

    def test_has_each_review_once_and_depends_only_on_seed_and_epoch(self, nsmc_data):
        sampler = nsmc_data.LengthGroupedSampler(self.LENGTHS, 8, seed=5)
        orders = {}
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            orders[epoch] = list(sampler)
            assert sorted(orders[epoch]) == list(range(len(sampler)))
        assert orders[0] != orders[1] != orders[2]
        torch.rand(7)  # a different random state
        again = nsmc_data.LengthGroupedSampler(self.LENGTHS, 8, seed=5)
        again.set_epoch(1)
        assert list(again) == orders[1]
        assert list(nsmc_data.LengthGroupedSampler(self.LENGTHS, 8, seed=6)) != orders[0]

    def test_a_batch_has_reviews_of_similar_length(self, nsmc_data):
        order = list(nsmc_data.LengthGroupedSampler(self.LENGTHS, 8, seed=5))
        padded, shuffled = (
            sum(
                8 * max(self.LENGTHS[at] for at in some[start : start + 8])
                for start in range(0, len(some) - 8, 8)
            )
            for some in (order, random.Random(4).sample(order, len(order)))
        )
        assert padded < 1.1 * sum(self.LENGTHS) < shuffled

    def test_the_batches_themselves_are_not_sorted(self, nsmc_data):
        lengths = self.LENGTHS[: 8 * nsmc_data.SHUFFLED_TOGETHER]
        order = list(nsmc_data.LengthGroupedSampler(lengths, 8, seed=5))
        firsts = [self.LENGTHS[at] for at in order[::8]]
        assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


class TestTokenizer:
    @pytest.mark.slow
    def test_is_the_same_in_a_process_with_a_different_hash_seed(self, tmp_path):
        chance = random.Random(9)  # many equally frequent pairs: the rule for ties decides
        texts = ["".join(chance.choices("가나다라마바사아자차카타파하 ", k=40)) for _ in range(400)]
        (tmp_path / "texts.json").write_text(json.dumps(texts))
        script = (
            "import hashlib, json, pathlib, sys; from nsmc_tokenizer import make_tokenizer;"
            "texts = json.loads(pathlib.Path(sys.argv[1]).read_text());"
            "tokenizer = make_tokenizer(texts, 64, 900).backend_tokenizer;"
            "print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())"
        )
        here = _make_tokenizer(texts, 900)
        environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(EXAMPLE)}
        command = [sys.executable, "-c", script, str(tmp_path / "texts.json")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert len(here) == 900
        assert result.stdout.strip() == hashlib.sha256(here.backend_tokenizer.to_str().encode()).hexdigest()

    def test_frequent_words_are_one_piece_and_rare_ones_several(self):
        tokenizer = _make_tokenizer(["너무 재밌어요"] * 9 + ["밌너"], 60)
        assert tokenizer.tokenize("너무   재밌어요") == ["▁너무", "▁재밌어요"]
        assert tokenizer.tokenize("요너 漢") == ["▁", "요", "너"]
        assert tokenizer("너무")["input_ids"][::2] == [tokenizer.cls_token_id, tokenizer.sep_token_id]

    def test_an_empty_review_is_a_valid_input(self):
        assert len(_make_tokenizer(["영화"])("漢")["input_ids"]) == 2


class TestDifferentReviews:
    @pytest.mark.parametrize("way", ["trainer", "loop"])
    def test_a_run_is_not_resumed_with_a_vocabulary_of_the_same_size_and_different_words(
        self, reviews, whole, tmp_path, way
    ):
        whole(way)
        train = _by_trainer if way == "trainer" else _by_loop
        for file in reviews.iterdir():
            file.write_text(file.read_text(encoding="utf-8").replace("영화", "만화"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"different vocabulary.*--subset"):
            train(reviews, tmp_path / "second", tmp_path / "whole")


class TestTrainer:
    def test_trains_and_its_best_model_labels_sentences(self, whole, tmp_path, capsys):
        assert whole("trainer")["test_accuracy"] > 0.9
        _assert_labels(tmp_path / "machine-1", capsys)

    def test_resumed_from_storage_it_ends_with_the_weights_of_an_uninterrupted_run(
        self, reviews, whole, tmp_path
    ):
        whole("trainer")
        _cut(tmp_path / "whole", tmp_path / "cut")
        _by_trainer(reviews, tmp_path / "machine-2", tmp_path / "cut")
        _assert_resumed(tmp_path)

    def test_a_pretrained_model_is_fine_tuned_and_served(self, reviews, tmp_path, zygote, monkeypatch):
        monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
        tokenizer = _make_tokenizer([text for _, text, _ in _generated(160, seed=160)])
        sizes = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 16}
        shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
        pretrained = ElectraForPreTraining(ElectraConfig(**sizes, **shape))
        for piece in (pretrained, tokenizer):
            piece.save_pretrained(tmp_path / "electra")
        frozen = ["--model", str(tmp_path / "electra"), "--learning_rate", "0", "--num_train_epochs", "1"]
        metrics = _by_trainer(reviews, tmp_path / "out", tmp_path / "run", *frozen)
        saved = load_file(tmp_path / "out" / "best" / "model.safetensors")
        name = "electra.encoder.layer.0.output.dense.weight"
        assert torch.equal(saved[name], pretrained.state_dict()[name]), "it began with the given weights"
        found = _labelled(zygote, reviews, str(tmp_path / "run"))
        assert found["accuracy"] == pytest.approx(metrics["test_accuracy"], abs=1e-12)


class TestLoop:
    def test_trains_and_its_best_model_labels_sentences(self, whole, tmp_path, capsys):
        assert whole("loop")["accuracy"] > 0.9
        log = json.loads((tmp_path / "machine-1" / "log.json").read_text())
        assert [record["epoch"] for record in log] == [0, 1]
        _assert_labels(tmp_path / "machine-1", capsys)

    def test_resumed_from_storage_it_ends_with_the_weights_of_an_uninterrupted_run(
        self, reviews, whole, tmp_path
    ):
        metrics = whole("loop")
        _cut(tmp_path / "whole", tmp_path / "cut")
        resumed = _by_loop(reviews, tmp_path / "machine-2", tmp_path / "cut")
        _assert_resumed(tmp_path)
        assert resumed == metrics

    def test_a_run_on_a_random_sample_is_resumed_to_the_weights_of_an_uninterrupted_one(
        self, reviews, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("tests.test_examples_nsmc.STEPS_AN_EPOCH", 10)
        sample = ["--sample", "80"]
        metrics = _by_loop(reviews, tmp_path / "machine-1", tmp_path / "whole", *sample)
        _cut(tmp_path / "whole", tmp_path / "cut")
        assert _by_loop(reviews, tmp_path / "machine-2", tmp_path / "cut", *sample) == metrics
        resumed = read_history(f"file://{tmp_path / 'cut'}").attempts[1]
        assert (resumed.first_step, resumed.last_step) == (14, 20)
        first, second = (
            load_file(tmp_path / f"machine-{n}" / "checkpoint-20" / "model.safetensors") for n in (1, 2)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_complete_run_is_tested_again_on_an_empty_machine(self, reviews, whole, tmp_path):
        assert whole("loop") == _by_loop(reviews, tmp_path / "machine-2", tmp_path / "whole")

    def test_the_best_model_is_tested_and_not_the_last(self, reviews, tmp_path, monkeypatch):
        accuracies, tested = iter((0.9, 0.8, 0.7)), []

        def evaluate(model, batches, accelerator):
            tested.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            return {"loss": 0.0, "accuracy": next(accuracies)}

        monkeypatch.setattr(importlib.import_module("train_loop"), "evaluate", evaluate)
        assert _by_loop(reviews, tmp_path / "out", tmp_path / "run")["accuracy"] == 0.7
        first, last, after = (each["classifier.weight"] for each in tested)
        assert torch.equal(after, first)
        assert not torch.equal(after, last)

    @pytest.mark.slow
    def test_the_loss_decreases_on_real_reviews(self, real_reviews, tmp_path):
        options = ["--subset", "2000", "--batch_size", "16", "--max_length", "32", "--save_steps", "200"]
        _by_loop(real_reviews, tmp_path / "out", tmp_path / "run", *options)
        first, second = json.loads((tmp_path / "out" / "log.json").read_text())
        assert second["train"]["loss"] < 0.8 * first["train"]["loss"]


class TestServed:
    @pytest.mark.parametrize("way", ["trainer", "loop"])
    def test_the_accuracy_through_an_endpoint_is_that_of_the_training_and_of_predict(
        self, reviews, whole, tmp_path, zygote, monkeypatch, way
    ):
        monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        metrics = whole(way)
        run = str(tmp_path / "whole")
        found = _labelled(zygote, reviews, run, "--best")
        importlib.import_module("nsmc_data").load_file(reviews, "test").to_parquet(tmp_path / "test.parquet")
        predicted = answer("predict", run, "test.parquet", "-o", "out.parquet", "--best")
        offline = metrics["test_accuracy" if way == "trainer" else "accuracy"]
        assert found["reviews"] == predicted["rows"] == TINY["test"]
        assert found["accuracy"] == predicted["accuracy"] == pytest.approx(offline, abs=1e-12)
        local = _labelled(zygote, reviews, str(tmp_path / "machine-1" / "best"))
        assert local["accuracy"] == found["accuracy"], (
            "the folder of the training needs neither run nor --trust-code"
        )

    def test_an_endpoint_that_is_not_there_is_named(self, reviews, tmp_path, monkeypatch, capfd):
        monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
        label = importlib.import_module("label")
        with pytest.raises(SystemExit, match="--endpoint NAME, or --url"):
            label.main(["--data_dir", str(reviews)])
        with pytest.raises(SystemExit):
            label.main(["--data_dir", str(reviews), "--endpoint", "nsmc"])
        assert "There is no endpoint 'nsmc'" in capfd.readouterr().err


class TestClassify:
    def test_the_best_model_of_a_run_is_downloaded(self, whole, tmp_path, capsys):
        whole("trainer")
        where = ["--model", str(tmp_path / "whole"), "--download_dir", str(tmp_path / "best")]
        (verdict,) = importlib.import_module("classify").main([*where, "정말 최고 감동"])
        assert verdict.label == "positive"
        best = json.loads((tmp_path / "whole" / ".cloudtrain" / "best.json").read_text())
        assert len(list((tmp_path / "best").glob("checkpoint-*/model.safetensors"))) == 1, best

    def test_a_folder_or_run_without_a_model_is_named(self, tmp_path):
        classify = importlib.import_module("classify")
        with pytest.raises(SystemExit, match=r"nothing' contains no model. .*--model"):
            classify.main(["--model", str(tmp_path / "nothing"), "좋다"])
        with pytest.raises(SystemExit, match=r"^[1-9]"):
            classify.main(["--model", f"file://{tmp_path / 'nothing'}", "좋다"])


def _generated(count: int, seed: int) -> list[tuple[str, str, int]]:
    """Return reviews whose label follows from a few words. The last two are empty after cleaning."""
    chance = random.Random(seed)
    rows = []
    for number in range(count - 2):
        label = chance.randint(0, 1)
        words = [
            *chance.choices(GOOD if label else BAD, k=2),
            *chance.choices(COMMON, k=chance.randint(0, 9)),
        ]
        rows.append((str(number), " ".join(chance.sample(words, len(words))), label))
    return [*rows, (str(count - 2), "漢字", 1), (str(count - 1), "", 0)]


def _write_raw(path: Path, rows: list[tuple[str, str, int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = ["id\tdocument\tlabel", *(f"{number}\t{text}\t{label}" for number, text, label in rows)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _make_tokenizer(texts: list[str], size: int = 100):
    return importlib.import_module("nsmc_tokenizer").make_tokenizer(texts, 64, size)


def _by_trainer(reviews: Path, out: Path, run: Path, *more: str) -> Metrics:
    steps = ["--save_steps", "7", "--eval_steps", "7", "--num_train_epochs", "2"]
    options = [*steps, *FAST, "--per_device_train_batch_size", "8", "--disable_tqdm", "true", *more]
    folders = ["--data_dir", str(reviews), "--output_dir", str(out), "--run_url", f"file://{run}"]
    metrics: Metrics = importlib.import_module("train_trainer").main([*folders, *options])
    return metrics


def _by_loop(reviews: Path, out: Path, run: Path, *more: str) -> Metrics:
    options = ["--num_epochs", "2", "--batch_size", "8", "--save_steps", "7", *FAST, *more]
    folders = ["--data_dir", str(reviews), "--output_dir", str(out), "--run_url", f"file://{run}"]
    metrics: Metrics = importlib.import_module("train_loop").main([*folders, *options])
    AcceleratorState._reset_state(reset_partial_state=True)
    return metrics


def _labelled(zygote: Zygote, reviews: Path, *what: str) -> Metrics:
    """What label.py finds of the test reviews through a server."""
    served = Served(zygote, *what)
    where = ["--data_dir", str(reviews), "--url", f"http://127.0.0.1:{served.port}", "--rows", "7"]
    found: Metrics = importlib.import_module("label").main(where)
    served.stop()
    return found


def _cut(whole: Path, cut: Path) -> None:
    """Copy the run as if the machine had died in the second epoch: without a manifest, a checkpoint does not exist."""
    shutil.copytree(whole, cut)
    for pointer in ("best", "last"):
        (cut / ".cloudtrain" / f"{pointer}.json").unlink(missing_ok=True)
    for manifest in (cut / ".cloudtrain" / "checkpoints").iterdir():
        if int(manifest.stem.split("-")[1]) > _last_in_epoch_1(whole):
            manifest.unlink()


def _last_in_epoch_1(run: Path) -> int:
    """Return the newest committed step before the end of the second epoch."""
    committed = [key.step for key in read_history(f"file://{run}").attempts[0].checkpoints]
    return max(step for step in committed if step < 2 * STEPS_AN_EPOCH - 3)


def _assert_resumed(tmp_path: Path) -> None:
    resumed = read_history(f"file://{tmp_path / 'cut'}").attempts[1]
    assert resumed.first_step == _last_in_epoch_1(tmp_path / "whole")
    assert resumed.last_step == 2 * STEPS_AN_EPOCH
    last = f"checkpoint-{2 * STEPS_AN_EPOCH}"
    whole, again = (load_file(tmp_path / f"machine-{n}" / last / "model.safetensors") for n in (1, 2))
    assert whole.keys() == again.keys()
    assert max(float((whole[key] - again[key]).abs().max()) for key in whole) == 0.0


def _assert_labels(output_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "best")
    model = AutoModelForSequenceClassification.from_pretrained(output_dir / "best")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert tokenizer("정말 감동ㅋㅋㅋㅋ")["input_ids"] == tokenizer("정말  감동ㅋㅋ")["input_ids"]
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    capsys.readouterr()
    sentences = ["정말 최고 감동ㅋㅋㅋㅋ", "너무 지루해요 노잼"]
    verdicts = importlib.import_module("classify").main(["--model", str(output_dir), *sentences])
    assert [verdict.label for verdict in verdicts] == ["positive", "negative"]
    assert all(0.5 < verdict.probability <= 1 for verdict in verdicts)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["positive", "negative"]
    assert [line.split("%  ")[1] for line in printed] == sentences
