"""The figures of the paper's analysis; importing this package registers them."""

from semalign.analysis.attribution import AttributionFigure
from semalign.analysis.decomposition import DecompositionFigure
from semalign.analysis.figure import FIGURES, AnalysisFigure, register_figure
from semalign.analysis.similarity import SimilarityFigure

__all__ = ["FIGURES", "AnalysisFigure", "register_figure"]

for _figure in (DecompositionFigure(), SimilarityFigure(), AttributionFigure()):
    register_figure(_figure)
