"""A BERT small enough to train from scratch on two cores, and its training parameters."""

from __future__ import annotations

from nsmc_data import LABELS
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

MAX_LENGTH = 64
"""Tokens. One review in seventy is longer, and rarely matters beyond that."""
BATCH_SIZE = 64
LEARNING_RATE = 7e-4
EPOCHS = 3
"""The validation loss is lowest after two epochs; the third, with a small learning rate, still improves the accuracy."""
WARMUP = 0.1
"""Share of the steps in which the learning rate rises; then it decreases linearly to 0."""


def make_model(
    tokenizer: PreTrainedTokenizerFast, max_length: int = MAX_LENGTH
) -> BertForSequenceClassification:
    """Create a model with two layers of width 128; its weights come from torch's random state, so set the seed first."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: at for at, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    # The loss of a classifier is a mean. Because forward has **kwargs, Trainer would treat it as a sum over the labels of all
    # processes and multiply it by their number.
    model.accepts_loss_kwargs = False
    return model
