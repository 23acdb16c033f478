"""What starts runs on clusters: scripts with stand-ins for the scheduler, the manifest against JobSet's schema."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from torch.distributed.run import get_args_parser

from metro_megatron import nvidia
from metro_megatron.cli.command_line import call_with_options
from metro_megatron.commands import doctor
from metro_megatron.config.file import parse_config
from metro_megatron.train.processes import NEW_STORE

ROOT = Path(__file__).parents[1]
PRETRAIN = ["--config", "examples/base_pp.yaml", "--data.train", "/shards", "--train.output", "/runs/x"]


def torchrun_options(words: list[str]) -> Any:
    """The launcher's options, known to torchrun; what it starts is known to our own command line."""
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.training_script == "pretrain_metro.py" and int(options.max_restarts) > 0
    assert parse_config(options.training_script_args).train.output
    return options


def stand_in(folder: Path, name: str, body: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/usr/bin/env bash\n{body}\n")
    tool.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with a virtual environment and Slurm's commands, which write down how they were called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    hostnames = 'if [[ $1 == show ]]; then printf "node%d\\n" {1..20000}; else echo "$@" >> requeued; fi'
    stand_in(tmp_path, "scontrol", hostnames)
    stand_in(tmp_path, "torchrun", f'[[ ${NEW_STORE} == 1 ]] && echo "torchrun $*" > called')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "4711",
    }
    return tmp_path, environment


def test_slurm_starts_one_launcher_a_node_and_requeues_when_time_is_up(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, environment = cluster
    stand_in(
        folder,
        "srun",
        f'[[ ${NEW_STORE} == 1 ]] && echo "$*" > called\n'
        + 'trap "echo saved > saved; exit 0" TERM; while :; do sleep 0.05; done',
    )
    script = subprocess.Popen([ROOT / "examples" / "slurm.sh", *PRETRAIN], env=environment, cwd=folder)
    deadline = time.monotonic() + 60
    while not (folder / "called").exists() or not (folder / "called").read_text():
        assert time.monotonic() < deadline and script.poll() is None
        time.sleep(0.05)
    options = torchrun_options(shlex.split((folder / "called").read_text()))
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "node1:29500")
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=60) == 0
    assert (folder / "saved").exists() and (folder / "requeued").read_text() == "requeue 4711\n"


def test_a_finished_job_is_not_requeued(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, environment = cluster
    stand_in(folder, "srun", "exit 0")
    subprocess.run([ROOT / "examples" / "slurm.sh", *PRETRAIN], env=environment, cwd=folder, check=True, timeout=60)
    assert not (folder / "requeued").exists()


def test_without_a_scheduler_the_same_line_works_on_all_machines(cluster: tuple[Path, dict[str, str]]) -> None:
    folder, environment = cluster
    script = [ROOT / "examples" / "torchrun_multi_node.sh", *PRETRAIN]
    own = {"NODES": "4", "FIRST_NODE": "10.0.0.1"}
    subprocess.run(script, env=environment | own, cwd=folder, check=True, timeout=60)
    options = torchrun_options(shlex.split((folder / "called").read_text()))
    assert (options.nnodes, options.rdzv_endpoint) == ("4", "10.0.0.1:29500")
    lacking = subprocess.run(script, env=environment, cwd=folder, timeout=60, capture_output=True, text=True)
    assert lacking.returncode != 0 and "NODES: number of machines" in lacking.stderr


def test_the_job_set_has_its_schema_s_fields_and_its_numbers_agree() -> None:
    manifest = yaml.safe_load((ROOT / "examples" / "kubernetes" / "jobset.yaml").read_text())
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None and read.to_dict() == manifest, "a field that the schema does not know is dropped"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    first, second = container["args"][0].split(" && exec ")
    options = torchrun_options(shlex.split(second))
    host = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}"
    assert options.rdzv_endpoint == f"{host}:29500", "the name that JobSet gives to the first pod"
    assert spec["parallelism"] == spec["completions"] == int(options.nnodes)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(options.nproc_per_node)
    assert {"name": NEW_STORE, "value": "1"} in container["env"]
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    asked: list[doctor.Options] = []

    def ask(options: doctor.Options) -> None:
        asked.append(options)

    call_with_options(ask, shlex.split(first)[2:])
    assert asked[0].gpus == gpus


def test_the_image_has_the_releases_that_errors_name_and_copies_what_there_is() -> None:
    text = (ROOT / "examples" / "kubernetes" / "Dockerfile").read_text()
    joined = text.replace("\\\n", " ")
    transformer_engine = re.search(r"'transformer_engine[^']+'", nvidia.TE_COMMAND)
    assert transformer_engine and transformer_engine[0] in joined
    apex = nvidia.APEX_COMMAND.partition(" (")[0].split()
    assert all(word in joined for word in apex)
    cuda = re.search(r"nvidia/cuda:(\d+)", joined)
    assert cuda and f"core_cu{cuda[1]}" in joined
    for line in joined.splitlines():
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources), line
    kinds = {line.split()[0] for line in joined.splitlines() if line and not line.startswith(("#", " "))}
    assert kinds <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY"}
