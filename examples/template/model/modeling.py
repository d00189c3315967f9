"""The model: an ordinary module that `save_pretrained` writes and `from_pretrained` reads."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration import ClassifierConfig


class Classifier(PreTrainedModel):
    """Says which class a sequence of symbols belongs to: the mean of their embeddings, and two layers above it.

    Example:
        >>> model = Classifier(ClassifierConfig(vocab_size=32, num_labels=2))
        >>> model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 2])
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # from_pretrained relies on it

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """`input_ids`: (batch, length); `labels`: (batch,). The loss is there where labels are."""
        pooled = self.embedding(input_ids).mean(dim=1)
        logits = self.classifier(self.dropout(torch.relu(self.hidden(pooled))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
