"""The model of this project, its tokenizer and its data."""
