"""A BERT small enough for a laptop, with a vocabulary from the task's own text, so that nothing is downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY_SIZE = 8000


def make_tokenizer(texts: Iterable[str], max_length: int, size: int = VOCABULARY_SIZE) -> BertTokenizer:
    """Build a WordPiece tokenizer over the most frequent words of `texts`; rarer words are split into characters.

    `tokenizers.trainers.WordPieceTrainer` is not used: it numbers its pieces in hash order, so each process would get a
    different vocabulary, while all ranks and all restarts of a run need the same one.
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


def make_config(tokenizer: BertTokenizer, max_length: int, vocab_size: int = 0) -> BertConfig:
    """Two layers of width 128: about 0.4 million weights besides the word embeddings, of which there are at least `vocab_size`."""
    return BertConfig(
        vocab_size=max(len(tokenizer), vocab_size),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max(max_length, 128),
        pad_token_id=tokenizer.pad_token_id,
    )


def make_model(config: BertConfig) -> BertForSequenceClassification:
    """Create new weights from the current random state of torch: set the seed first."""
    return BertForSequenceClassification(config)
