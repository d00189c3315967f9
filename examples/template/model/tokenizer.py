"""The tokenizer; saved beside the weights."""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def build_tokenizer(
    texts: list[str], vocab_size: int = 20_000, max_length: int = 256
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is the most frequent words of the texts.

    The same texts give the same vocabulary, in each process and after each restart. A pretrained one can replace it:
    `AutoTokenizer.from_pretrained(...)`.

    Args:
        texts: of the training data.
        vocab_size: the largest size of the vocabulary.
        max_length: longer texts are cut to this number of tokens.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # lower case; Chinese characters become words
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]"]
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # [CLS] in front, so that an empty text has a token too.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", special.index("[CLS]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
    )
