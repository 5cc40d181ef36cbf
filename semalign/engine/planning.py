"""`--plan`: prints what a transfer or a sweep would do and cost, without loading a weight."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table

from semalign.artifacts.artifact import Workspace
from semalign.config.jobs import Config
from semalign.engine.cluster import check_resources, check_sweep, cluster_resources, connect
from semalign.engine.limits import check_engines
from semalign.errors import UserError
from semalign.files import bytes_text
from semalign.methods import Transfer
from semalign.models.published import STAND_IN
from semalign.plan import TIME_NOTE, Plan, Step, plan_rows, plan_transfer, rates
from semalign.report.table import new_console, terminal
from semalign.sweep.file import Sweep
from semalign.sweep.plan import method_rows, plan_sweep, sweep_rows
from semalign.sweep.trials import trials


def show_plan(config: Config) -> None:
    """Print the plan. Raises UserError when the cluster cannot hold it."""
    transfer = Transfer.of(config, planned=True)
    plan = plan_transfer(transfer, Workspace(config.work))
    _print(plan)
    transfer.check_room(Workspace(config.work))
    available = _available(transfer.config)
    check_resources(transfer.config, available)
    check_engines([transfer])
    _check_memory(transfer.config, plan.steps, available)


def show_sweep_plan(sweep: Sweep, *, yes: bool = False) -> None:
    """Print what a sweep needs once, and what its trials would need one by one.

    Raises UserError when the cluster cannot hold it.
    """
    planned = trials(sweep, yes=yes)
    compared = sweep.compare is not None
    plan = plan_sweep(planned, compared=compared, held_back=sweep.held_back)
    console = new_console()
    console.print(terminal(sweep.description, *sweep_rows(plan)))
    _print_absent(console, plan.absent)
    if sweep.compare is not None:
        console.print(terminal("one transfer of each", *method_rows(plan, sweep.compare.axis)))
    if not plan.exact:
        console.print("some pairs are decided by attribution: those figures are upper bounds")
    configs = {trial.setting: trial.config for trial in planned}
    available = _available(planned[0].config)  # all trials share the cluster
    check_sweep(list(configs.values()), available, compared=compared)
    check_engines(plan.transfers.values())
    _check_memory(planned[0].config, plan.once.steps, available)


def _check_memory(config: Config, steps: Iterable[Step], available: dict[str, float]) -> None:
    if config.cluster.autoscaling:
        return
    for step in steps:
        needed = step.memory * step.actors
        if step.gpus == 0 and needed > available["memory"]:
            raise UserError(
                f"{step.stage}: needs about {bytes_text(needed)} of memory, the cluster has "
                f"{bytes_text(available['memory'])}; use fewer actors or a smaller dtype"
            )


def _available(config: Config) -> dict[str, float]:
    """Of the cluster that a run would join; of this machine when there is none."""
    if config.cluster.address is None and "RAY_ADDRESS" not in os.environ:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = torch.cuda.device_count()
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": float(memory)}
    with connect(config.cluster.address):
        return cluster_resources()


def _print(plan: Plan) -> None:
    console = new_console()
    config, inputs = plan.transfer.config, plan.transfer.inputs
    for role, model in (("teacher", inputs.teacher), ("student", inputs.student)):
        shape = model.shape
        console.print(
            f"{role} {model.path}: {shape.layers} layers of width {shape.width}, vocabulary "
            f"{shape.vocabulary}, {shape.weights / 1e6:.1f}M weights"
        )
    _print_absent(console, inputs.absent)
    console.print(f"vocabulary overlap {inputs.shared.fraction:.2%}")
    stored = inputs.train.positions(config.extraction.positions).sum()
    console.print(
        f"{len(inputs.train)} training examples, {inputs.train.length} tokens, {stored} stored "
        "positions"
    )
    if plan.pairs is None:
        console.print("pairs: decided by attribution; the figures below are upper bounds")
    for pair in plan.pairs or ():
        console.print(f"pair: {pair}")
    console.print(f"method {config.method}: {plan.trained:,} trained parameters")
    head, body = plan_rows(plan, rates(plan))
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    console.print(table)
    console.print("evaluation is estimated from the training set's mean length")
    console.print(TIME_NOTE)


def _print_absent(console: Console, absent: Iterable[str]) -> None:
    for path in absent:
        console.print(
            f"{path} is not at hand: planned with its published shape; tokens are counted by the "
            f"tokenizer of {STAND_IN}"
        )
