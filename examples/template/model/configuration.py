"""The configuration of the model; saved as `config.json` beside the weights."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ClassifierConfig(PretrainedConfig):
    """Sizes of a `Classifier`. All arguments need a default, because transformers creates default objects for comparison."""

    model_type = "template-classifier"

    def __init__(
        self, vocab_size: int = 32, hidden_size: int = 64, dropout: float = 0.1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)  # accepts num_labels, id2label and so on
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.dropout = dropout
