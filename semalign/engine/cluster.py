"""Joining a Ray cluster, and refusing at once what it cannot hold."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from semalign.config.jobs import AnalysisJob, Config, EvaluationJob
from semalign.config.sections import Evaluation
from semalign.errors import Failed, UserError, one_line, root_cause
from semalign.methods.method import method_of
from semalign.models.memory import ENGINE
from semalign.plan import Step
from semalign.plugins import VARIABLE

_API_SERVER = "RAY_API_SERVER_ADDRESS"
_PROBE_S = 5  # seconds
_START_WAIT = "RAY_raylet_start_wait_time_s"
# What Ray raises when a process of its own does not answer in time; it has no class for that.
_LATE = ("timed out during startup", "raylet_start_wait_time_s", "GCS has become overloaded")
_ATTEMPTS = 2  # some of Ray's own waits, of 15 seconds, cannot be set

Wanted = dict[str, tuple[float, dict[str, float]]]  # key -> (its value, CPUs and GPUs in all)


@contextmanager
def connect(address: str | None, *, num_cpus: int | None = None) -> Iterator[None]:
    """Join the cluster at `address` or RAY_ADDRESS, or start one here and close it at the end.

    A job submitted to a cluster has RAY_ADDRESS set. A cluster of our own has `num_cpus` CPUs
    (default: those of this machine); its dashboard is on the loopback interface, and its other
    ports ask for a token that only this run knows, unless RAY_AUTH_MODE says otherwise.
    """
    if ray.is_initialized():
        with _unwrapping():
            yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # no GPU asked, none seen
    ours = address is None and "RAY_ADDRESS" not in os.environ
    handler = signal.getsignal(signal.SIGTERM)
    for attempt in range(_ATTEMPTS if ours else 1):
        try:
            # "local", or Ray would join whatever cluster was started on this machine before
            where = _new_cluster(num_cpus) if ours else {"address": address}
            ray.init(logging_level=logging.WARNING, runtime_env=_plugins(), **where)
            break
        except Exception as error:  # Ray raises bare ones, too
            ray.shutdown()  # whatever has been started
            if ours:
                del os.environ[_API_SERVER]
            if ours and _is_late(error) and attempt + 1 < _ATTEMPTS:
                print("[cluster] Ray did not start in time; once more", flush=True)
                continue
            raise not_joined(error, None if ours else address or "auto") from error
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's would end the process without a word
    try:
        with _unwrapping():
            yield
    finally:
        ray.shutdown()
        if ours:
            del os.environ[_API_SERVER]


def _new_cluster(num_cpus: int | None) -> dict[str, Any]:
    """What starts a cluster of our own."""
    # Ray asks for a token by default. Its own it would write to the home directory, where a
    # later `ray start` takes it up and a later `ray job submit` does not.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's State API, which Ray Train asks on every run, would look for the cluster in a file
    # of /tmp that a `ray start` killed long ago may have left, and wait for it in vain.
    port = _free_port()
    os.environ[_API_SERVER] = f"http://127.0.0.1:{port}"
    return {
        "address": "local",
        "num_cpus": num_cpus,
        # the dashboard is needed: Ray Train asks it which placement groups a dead driver has left
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": port,
    }


@contextmanager
def _unwrapping() -> Iterator[None]:
    """Within the context our own errors of workers are raised without Ray's traceback in them."""
    try:
        yield
    except (UserError, Failed) as error:
        raise root_cause(error) from error.__cause__


def not_joined(error: Exception, address: str | None) -> UserError | Failed:
    """What `ray.init` raised, as one line; without an `address` it was to start a cluster here."""
    reason, named = one_line(error, limit=300), f"cluster.address={address}"
    if address == "auto" and "RAY_ADDRESS" in os.environ:
        address = os.environ["RAY_ADDRESS"]
        named = f"RAY_ADDRESS={address}"
    if isinstance(error, AuthenticationError) or (address and _wants_token(address)):
        return UserError(
            f"{named if address else 'Ray'}: the token was not accepted; set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN to the token that the cluster's head was started with"
        )
    if _is_late(error):
        return Failed(
            f"{named if address else 'Ray'}: it did not start in time, as on a machine that is "
            "busy or short of memory; run again when there is less load, or give it longer: "
            f"{_START_WAIT}=120 in the environment (seconds)"
        )
    if address is None:
        return Failed(f"Ray cannot be started here ({type(error).__name__}: {reason})")
    if "ersion mismatch" in reason:
        return UserError(f"{named}: {reason}")
    return UserError(f"{named}: no Ray cluster answers there ({reason})")


def _is_late(error: Exception) -> bool:
    return any(text in one_line(error, limit=300) for text in _LATE)


def _wants_token(address: str) -> bool:
    """Whether a cluster answers there and refuses a call without a token, which Ray only logs."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.JobInfoGcsService/GetNextJobID")
        try:
            call(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False


def _plugins() -> dict[str, Any] | None:
    """The runtime environment in which every process imports the plugins of this one."""
    if not (names := os.environ.get(VARIABLE)):
        return None
    hook = "semalign.plugins.load_plugins"
    return {"env_vars": {VARIABLE: names}, "worker_process_setup_hook": hook}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cluster_resources() -> dict[str, float]:
    """CPUs, GPUs and bytes of memory of the whole cluster that this process has joined."""
    return {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU", "memory")}


def check_resources(
    config: Config | EvaluationJob | AnalysisJob, available: dict[str, float]
) -> None:
    """Raise UserError when a stage wants more CPUs or GPUs than there are in all.

    Ray would wait for ever for resources that do not exist.
    """
    if config.cluster.autoscaling:
        return
    for key, (value, resources) in _wanted(config).items():
        for resource, needed in resources.items():
            if needed > available[resource]:
                raise UserError(
                    f"{key}={value:g}: needs {needed:g} {resource}s, the cluster has "
                    f"{available[resource]:g}; ask for fewer (cluster.autoscaling=true waits for "
                    "nodes to come)"
                )


def check_sweep(configs: Sequence[Config], available: dict[str, float], *, compared: bool) -> None:
    """The same for the trials of a sweep, whose engines hold their GPUs from its first stage on.

    More engines are started for whole students, and for teachers where methods are `compared`.
    """
    for config in configs:
        check_resources(config, available)
    held = held_gpus(configs)
    for config in configs:
        stages = _wanted(config)
        if method_of(config).rank(config) is not None and not compared:
            del stages["evaluation.num_engines"]  # those that are held
        needed = max(resources["GPU"] for _, resources in stages.values())
        if held and held + needed > available["GPU"] and not config.cluster.autoscaling:
            raise UserError(
                f"evaluation.num_gpus={config.evaluation.num_gpus:g}: the engines of a sweep hold "
                f"{held:g} GPUs all along, and a stage needs {needed:g} more; the cluster has "
                f"{available['GPU']:g}; ask for fewer (cluster.autoscaling=true waits for nodes to "
                "come)"
            )


def holds_all(config: Config, stages: Sequence[Step], engines: Sequence[int]) -> bool:
    """Whether the engines of models of so many bytes can run next to any of the stages: there are
    GPUs for both, and every node has memory for both.
    """
    each = _engines(config.evaluation)[1]["GPU"]
    gpus = max((step.gpus * step.actors for step in stages if not step.cached), default=0)
    if len(engines) * each + gpus > cluster_resources()["GPU"]:
        return False
    on_cpus = [step.memory * step.actors for step in stages if not step.gpus]
    needed = max(on_cpus, default=0)
    if not each:
        needed += config.evaluation.num_engines * sum(size + ENGINE for size in engines)
    nodes = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return needed < min(nodes, default=0.0)


def held_gpus(configs: Sequence[Config]) -> float:
    """Of the engines that all trials share, those of each student."""
    settings = configs[0].evaluation
    students = {config.student for config in configs}
    return len(students) * _engines(settings)[1]["GPU"]


def _wanted(config: Config | EvaluationJob | AnalysisJob) -> Wanted:
    if isinstance(config, AnalysisJob):
        return {
            "num_cpus": (config.num_cpus, {"CPU": config.num_cpus}),
            "num_gpus": (config.num_gpus, {"GPU": config.num_gpus}),
        }
    if isinstance(config, EvaluationJob):
        return {"num_engines": _engines(config)}
    extraction, training = config.extraction, config.training
    return {
        "extraction.num_actors": _processes(
            extraction.num_actors, extraction.num_cpus, extraction.num_gpus
        ),
        "training.num_workers": _processes(
            training.num_workers, training.cpus_per_worker, training.use_gpu
        ),
        "evaluation.num_engines": _engines(config.evaluation),
    }


def _engines(settings: Evaluation) -> tuple[float, dict[str, float]]:
    gpus = settings.num_gpus * settings.tensor_parallel_size
    return _processes(settings.num_engines, settings.num_cpus, gpus)


def _processes(count: int, cpus: float, gpus: float) -> tuple[float, dict[str, float]]:
    return count, {"CPU": count * cpus, "GPU": count * gpus}
