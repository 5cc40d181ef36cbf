"""Submit one evaluation: python ray_jobs/evaluate.py [--plan] [file.yaml ...] [key=value ...]"""

from __future__ import annotations

import sys

from semalign.cli import main

if __name__ == "__main__":
    from semalign.config.jobs import EvaluationJob
    from semalign.engine.scoring import run_evaluation, show_evaluation_plan

    sys.exit(main(sys.argv[1:], EvaluationJob, run=run_evaluation, plan=show_evaluation_plan))
