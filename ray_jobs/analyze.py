"""Submit one figure: python ray_jobs/analyze.py [--plan] [file.yaml ...] [key=value ...]"""

from __future__ import annotations

import sys

from semalign.cli import main

if __name__ == "__main__":
    from semalign.config.jobs import AnalysisJob
    from semalign.engine.analysis import run_analysis, show_analysis_plan

    sys.exit(main(sys.argv[1:], AnalysisJob, run=run_analysis, plan=show_analysis_plan))
