"""The paper's mathematics: tensors and keyword scalars in, tensors out."""
