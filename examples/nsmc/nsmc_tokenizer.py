"""A tokenizer of frequent word pieces, trained on the reviews: Korean without a morpheme analyser."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from nsmc_data import CLEANING
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_SIZE = 12000


def make_tokenizer(
    texts: Iterable[str], max_length: int, size: int = VOCABULARY_SIZE
) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding over syllables: 재밌어요 becomes ▁재밌 + 어요 if these are frequent enough.

    The same texts give the same vocabulary in each process: pairs are merged by frequency, then by their numbers. (Pieces marked
    by "##", as in WordPiece, would be numbered in hash order; "▁" avoids that.) The cleaning of nsmc_data is part of the
    tokenizer, so it is stored in the model's folder.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    replace = [normalizers.Replace(Regex(pattern), replacement) for pattern, replacement in CLEANING]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), *replace, normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def check_vocabulary(checkpoint: str | Path | None, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError if the checkpoint has a different vocabulary: the same ids would mean different words."""
    saved = checkpoint and Tokenizer.from_file(str(Path(checkpoint, "tokenizer.json")))
    if saved and saved.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"'{checkpoint}' was trained with a different vocabulary. Resume that run with its own --data_dir, --subset and "
            "--seed, or start a new run with a different --run_url and --output_dir."
        )


def encode(reviews: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """Tokenize the reviews: the columns input_ids, attention_mask and labels."""
    columns = tokenizer(reviews["document"][:], truncation=True)
    return Dataset.from_dict({**columns, "labels": reviews["label"][:]})
