"""SemAlign: transfer knowledge from a large language model to a smaller one through activations."""

__version__ = "0.1.0"
