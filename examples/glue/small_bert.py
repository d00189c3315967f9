"""A BERT small enough for a laptop, with a vocabulary taken from the task's own text: nothing to download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_SIZE = 8000


def make_tokenizer(texts: Iterable[str], max_length: int, size: int = VOCABULARY_SIZE) -> BertTokenizer:
    """WordPiece over the most frequent words of `texts`; a rarer word is spelt from known beginnings and characters.

    `tokenizers.trainers.WordPieceTrainer` is not used: it numbers its pieces in hash order, so every process would
    get another vocabulary, while every rank and every restart of a run needs the same one.
    """
    plain = BertTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        pieces = plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    characters = sorted({character for word in words for character in word})
    spelling = [*characters, *(f"##{character}" for character in characters)]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    tokens = list(dict.fromkeys([*SPECIAL_TOKENS, *spelling, *frequent]))[: max(size, len(spelling))]
    return BertTokenizer(vocab={token: at for at, token in enumerate(tokens)}, model_max_length=max_length)


def make_config(tokenizer: BertTokenizer, max_length: int) -> BertConfig:
    """Two layers of width 128: about 0.4 million weights beside the word embeddings."""
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max(max_length, 128),
        pad_token_id=tokenizer.pad_token_id,
    )


def make_model(config: BertConfig) -> BertForSequenceClassification:
    """Fresh weights, from torch's current random state: seed it first."""
    return BertForSequenceClassification(config)
