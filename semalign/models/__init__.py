"""Hugging Face causal language models seen as stacks of layers: load, look inside, adapt."""
