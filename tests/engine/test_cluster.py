"""A cluster of one's own: guarded by a token, and nothing of it left in the home directory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray._private.node
import ray._private.services
from ray.exceptions import AuthenticationError

from semalign.artifacts.artifact import Cost
from semalign.config.jobs import Config
from semalign.config.read import resolve
from semalign.config.sections import Evaluation
from semalign.engine.cluster import check_sweep, connect, held_gpus, holds_all, not_joined
from semalign.engine.serving import Engines
from semalign.errors import Failed, UserError
from semalign.models.reference import Model
from semalign.plan import Step
from semalign.stages.judged import served
from tests.engine.faults import wait_for

SCRIPT = """
import os
import signal
import ray
from semalign.engine.cluster import cluster_resources, connect
before = signal.getsignal(signal.SIGTERM)
with connect(None, num_cpus=1):
    assert signal.getsignal(signal.SIGTERM) is before
    print(ray.get(ray.remote(lambda: 40 + 2).remote()), cluster_resources()["CPU"])
    print(os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
"""


def test_a_local_cluster_has_a_token_of_its_own(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**clean, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["42 1.0", "token 64"], done.stderr
    assert not (tmp_path / ".ray").exists()


STALE = """
import time
import ray
from ray.util.state import list_actors
from semalign.engine.cluster import connect
with connect(None, num_cpus=1):
    begin = time.monotonic()
    @ray.remote
    def count():
        return len(list_actors())
    print(ray.get(count.remote()), time.monotonic() - begin < 9)
"""


def test_a_cluster_of_long_ago_is_not_waited_for() -> None:
    """What a killed `ray start` leaves behind must not be taken for the cluster that runs."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:  # short: it holds sockets
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("192.0.2.1:6479")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", STALE],
            env={**clean, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
        )
    assert done.stdout.splitlines() == ["0 True"], done.stderr


GPUS = ["training.use_gpu=true", "evaluation.num_gpus=1", "extraction.num_gpus=1"]


def trial(*overrides: str) -> Config:
    return resolve([], [*GPUS, *overrides])


def test_a_sweeps_engines_leave_room_for_its_stages() -> None:
    """Each stage alone fits one GPU; the engines hold theirs from the first stage to the last."""
    one = {"CPU": 8.0, "GPU": 1.0, "memory": 1e12}
    with pytest.raises(
        UserError, match="the engines of a sweep hold 1 GPUs all along, and a stage"
    ):
        check_sweep([trial()], one, compared=False)
    check_sweep([trial()], {**one, "GPU": 2.0}, compared=False)
    check_sweep([trial("cluster.autoscaling=true")], one, compared=False)
    check_sweep([trial("evaluation.num_gpus=0")], one, compared=False)


def test_only_other_models_need_other_engines() -> None:
    """Adapters are scored by the engines that are held; whole students and teachers are not."""
    one, on_cpu = {"CPU": 8.0, "GPU": 1.0}, ["training.use_gpu=false", "extraction.num_gpus=0"]
    check_sweep([trial(*on_cpu)], one, compared=False)
    for refused, compared in (([], True), (["method=laten"], False)):
        with pytest.raises(UserError, match="and a stage needs 1 more; the cluster has 1"):
            check_sweep([trial(*on_cpu, *refused)], one, compared=compared)


def test_every_student_has_engines_of_its_own() -> None:
    both = [trial(), trial("student=zoo/teacher", "evaluation.num_engines=2")]
    assert held_gpus(both) == 2
    assert held_gpus([trial("evaluation.tensor_parallel_size=4"), trial()]) == 4


def test_engines_start_early_where_memory_and_gpus_hold_both(ray_cluster: None) -> None:
    small = [Step(stage="train", cost=Cost(memory=10**8))]
    on_cpu = resolve([], [])
    assert holds_all(on_cpu, small, [10**8, 10**8])
    assert not holds_all(on_cpu, small, [10**15])
    assert not holds_all(on_cpu, [Step(stage="extract", cost=Cost(memory=10**15))], [10**8])
    assert not holds_all(resolve([], ["evaluation.num_gpus=1"]), small, [10**8])  # there is none


def test_engines_are_started_once_for_all_that_fit_them(engines: Engines) -> None:
    model, settings = Model.open("zoo/student", dtype="float32"), Evaluation()
    engines.start(model, settings, [16])
    [first] = engines.running[served(model)]
    for ranks in ([16], [4], []):
        engines.start(model, settings, ranks)
    assert engines.running[served(model)] == [first]
    engines.start(model, settings, [64])  # which they have no room for
    [second] = engines.running[served(model)]
    assert second != first


def test_a_cluster_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Exception("The current node timed out during startup. This could happen because")
    for address in (None, "127.0.0.1:1"):
        error = not_joined(late, address)
        assert isinstance(error, Failed)
        assert "did not start in time" in str(error)
        assert "RAY_raylet_start_wait_time_s=120 in the environment" in str(error)
    ours = not_joined(RuntimeError("Failed to start\nthe dashboard"), None)
    assert isinstance(ours, Failed)
    assert str(ours) == "Ray cannot be started here (RuntimeError: Failed to start the dashboard)"
    error = not_joined(AuthenticationError("no authentication token was found"), "127.0.0.1:1")
    assert str(error).startswith("cluster.address=127.0.0.1:1: the token was not accepted; set RA")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    nowhere = str(not_joined(ConnectionError("Could not connect"), "auto"))
    assert nowhere == "RAY_ADDRESS=127.0.0.1:2: no Ray cluster answers there (Could not connect)"
    versions = RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9")
    assert str(not_joined(versions, "127.0.0.1:1")).startswith(
        "cluster.address=127.0.0.1:1: Version mismatch: The"
    )


def test_a_worker_of_ray_keeps_its_imports_light(ray_cluster: None) -> None:
    """The process that asks for it does not change."""

    def absent() -> bool:
        from transformers.utils import is_sklearn_available

        import semalign.engine  # noqa: F401

        return not is_sklearn_available()

    assert ray.get(ray.remote(absent).remote())
    assert not absent()


@pytest.mark.parametrize(
    ("raised", "address", "times"),
    [
        ("The current node timed out during startup", None, 2),
        ("Failed to start the dashboard", None, 1),
        ("The current node timed out during startup", "127.0.0.1:1", 1),
    ],
)
def test_a_late_start_of_our_own_is_tried_once_more(
    raised: str,
    address: str | None,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = []

    def init(**where: object) -> None:
        tried.append(where)
        raise Exception(raised)

    for name, replaced in {
        "is_initialized": lambda: False,
        "init": init,
        "shutdown": lambda: None,
    }.items():
        monkeypatch.setattr(ray, name, replaced)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # connect would leave one
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises((Failed, UserError)), connect(address):
        raise AssertionError("joined")
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    assert len(tried) == times
    assert capsys.readouterr().out.count("[cluster] Ray did not start in time; once more") == (
        times - 1
    )


@pytest.mark.parametrize(("mode", "named"), [("token", "token was not acc"), ("disabled", "no Ra")])
def test_a_token_that_is_not_accepted_is_named(mode: str, named: str, tmp_path: Path) -> None:
    """Ray raises the same error as where there is no cluster. Here its head's first process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *(ray._private.services.GCS_SERVER_EXECUTABLE, f"--gcs_server_port={port}"),
            *(f"--log_dir={tmp_path}", "--config_list=e30=", "--metrics-agent-port=0"),
            *("--node-ip-address=127.0.0.1", "--session-name=test"),
        ],
        env=os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "0" * 64},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, timeout=60)
        error = not_joined(ConnectionError("Could not connect"), f"127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()
    assert isinstance(error, UserError) and named in str(error)


def test_rays_words_for_a_late_start_are_its_own() -> None:
    """They are looked for in its errors, for which it has no class."""
    source = Path(ray._private.node.__file__).read_text()
    assert "timed out during startup" in source
