"""`--plan`: what a transfer would do and cost, said without loading a weight."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from semalign.config.jobs import Config
from semalign.engine.cluster import check_resources, check_sweep, cluster_resources, connect
from semalign.errors import UserError
from semalign.models.published import STAND_IN
from semalign.report.table import new_console, terminal
from semalign.stages.inputs import load_inputs
from semalign.stages.plan import Plan, Step, known_pairs, make_plan
from semalign.stages.sweep_plan import method_rows, plan_sweep, rows
from semalign.sweep.file import Sweep
from semalign.sweep.trials import trials


def show_plan(config: Config) -> None:
    """Print the plan. Raises UserError when the cluster cannot hold it."""
    inputs = load_inputs(config, planned=True)
    plan = make_plan(config, inputs, known_pairs(config, inputs))
    _print(config, plan)
    available = _available(config)
    check_resources(config, available)
    _check_memory(config, plan.steps, available)


def show_sweep_plan(sweep: Sweep, *, yes: bool = False) -> None:
    """Print what a sweep needs once, and what its trials would need one by one.

    Raises UserError when the cluster cannot hold it.
    """
    planned = trials(sweep, yes=yes)
    compared = sweep.compare is not None
    plan = plan_sweep(planned, compared=compared)
    console = new_console()
    console.print(terminal(sweep.description, *rows(plan)))
    _say_absent(console, plan.absent)
    if sweep.compare is not None:
        console.print(terminal("one transfer of each", *method_rows(plan, sweep.compare.axis)))
    if not plan.exact:
        console.print("some pairs are decided by attribution: those figures are upper bounds")
    configs = {trial.setting: trial.config for trial in planned}
    available = _available(planned[0].config)  # all trials share the cluster
    check_sweep(list(configs.values()), available, compared=compared)
    _check_memory(planned[0].config, plan.once.steps, available)


def _check_memory(config: Config, steps: Sequence[Step], available: dict[str, float]) -> None:
    if config.cluster.autoscaling:
        return
    for step in steps:
        needed = step.memory * step.actors
        if step.gpus == 0 and needed > available["memory"]:
            raise UserError(
                f"{step.name}: needs about {_bytes(needed)} of memory, the cluster has "
                f"{_bytes(available['memory'])}; use fewer actors or a smaller dtype"
            )


def _available(config: Config) -> dict[str, float]:
    """Of the cluster that a run would join; of this machine when there is none."""
    if config.cluster.address is None and "RAY_ADDRESS" not in os.environ:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = torch.cuda.device_count()
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": float(memory)}
    with connect(config.cluster.address):
        return cluster_resources()


def _print(config: Config, plan: Plan) -> None:
    console = new_console()
    for role, path, shape in (
        ("teacher", config.teacher, plan.teacher),
        ("student", config.student, plan.student),
    ):
        console.print(
            f"{role} {path}: {shape.layers} layers of width {shape.width}, vocabulary "
            f"{shape.vocabulary}, {shape.weights / 1e6:.1f}M weights"
        )
    _say_absent(console, plan.absent)
    console.print(f"vocabulary overlap {plan.overlap:.2%}")
    console.print(
        f"{plan.examples} training examples, {plan.tokens} tokens, {plan.positions} stored "
        "positions"
    )
    if plan.pairs is None:
        console.print("pairs: decided by attribution; the figures below are upper bounds")
    for pair in plan.pairs or ():
        console.print(f"pair: {pair}")
    console.print(f"method {config.method}: {plan.trained:,} trained parameters")
    table = Table(
        "stage", "operations", "share", "disk", "memory / actor", "actors", "GPUs / actor"
    )
    total = sum(step.operations for step in plan.steps)
    for step in plan.steps:
        table.add_row(
            step.name,
            f"{step.operations:.2e}",
            f"{step.operations / total:.1%}",
            _bytes(step.disk) if step.disk else "",
            _bytes(step.memory),
            str(step.actors),
            f"{step.gpus:g}",
        )
    table.add_row("total", f"{total:.2e}", "", _bytes(sum(step.disk for step in plan.steps)))
    console.print(table)
    console.print("evaluation is estimated from the training set's mean length")


def _say_absent(console: Console, absent: Sequence[str]) -> None:
    for path in absent:
        console.print(
            f"{path} is not at hand: planned with its published shape; tokens are counted by the "
            f"tokenizer of {STAND_IN}"
        )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
