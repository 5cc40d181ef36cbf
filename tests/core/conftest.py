"""The shapes in core's signatures are checked whenever the tests run."""

from jaxtyping import install_import_hook

install_import_hook("semalign.core", "beartype.beartype")
