"""The model: a module that `save_pretrained` saves and `from_pretrained` loads."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration import ClassifierConfig


class Classifier(PreTrainedModel):
    """Classifies a text: the mean of its words' embeddings, and two layers.

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
        self.post_init()  # from_pretrained needs it

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """`input_ids` and `attention_mask`: (batch, length); `labels`: (batch,). The output has a loss if labels are given."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embedded = self.embedding(input_ids) * mask.unsqueeze(-1)
        pooled = embedded.sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits = self.classifier(self.dropout(torch.relu(self.hidden(pooled))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
