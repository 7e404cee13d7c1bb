"""Text to tokens: documents from files, the tokenizer."""
