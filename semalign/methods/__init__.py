"""The methods of transfer. Importing this package registers those that semalign ships."""

from semalign.methods import controls, semalign
from semalign.methods.laten import method as laten
from semalign.methods.method import METHODS, Method, Recipe, Transfer, register_method
from semalign.methods.seeking import method as seeking

__all__ = [
    "METHODS",
    "Method",
    "Recipe",
    "Transfer",
    "controls",
    "laten",
    "register_method",
    "seeking",
    "semalign",
]
