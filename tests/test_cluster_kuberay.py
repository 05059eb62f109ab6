"""KubeRay's manifests: its own schema accepts them, and they promise what ray_cluster.yaml does.  And the image."""

import copy
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "tests" / "data" / "kuberay.json").read_text(encoding="utf-8"))
VERSION = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)


def manifests(name):
    text = (ROOT / "cluster" / "kuberay" / name).read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def problems(manifest):
    """Return where a manifest breaks the schema of its kind, as `path: message`."""
    schema = {"$ref": f"#/$defs/{manifest['kind']}", "$defs": SCHEMA["$defs"]}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@pytest.fixture
def claim_and_cluster():
    return manifests("raycluster.yaml")


@pytest.fixture
def cluster(claim_and_cluster):
    return claim_and_cluster["RayCluster"]


@pytest.fixture
def job():
    return manifests("rayjob.yaml")["RayJob"]


def test_kuberay_accepts_them(claim_and_cluster, job):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for manifest in (*claim_and_cluster.values(), job):
        assert problems(manifest) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda spec: spec.update(enableAutoscaling=True), "spec: "),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "spec.authOptions.mode: "),
        (lambda spec: spec["headGroupSpec"].pop("template"), "spec.headGroupSpec: "),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "spec.headGroupSpec.rayStart"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="4"), "spec.workerGroupSpecs.0.maxReplicas: "),
        (lambda spec: spec["workerGroupSpecs"][0].update(lables={}), "spec.workerGroupSpecs.0: "),
        (lambda spec: _container(spec["workerGroupSpecs"][0]).update(volumeMount=[]), "containers.0: "),
        (lambda spec: _container(spec["headGroupSpec"])["env"][1].update(value=600), "env.1.value: "),
        (
            lambda spec: _container(spec["headGroupSpec"])["resources"]["limits"].update(memory="16 GB"),
            "limits.memory: ",
        ),
    ],
)
def test_mistakes_are_caught(cluster, change, where):
    """Planted bugs, each of which Kubernetes would refuse as well."""
    changed = copy.deepcopy(cluster)
    change(changed["spec"])
    found = problems(changed)
    assert len(found) == 1
    assert where in found[0]


def _container(group):
    return group["template"]["spec"]["containers"][0]


def test_a_job_has_the_same_cluster(cluster, job):
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_the_job_trains_a_configuration_that_the_image_has(job):
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "cluster.cli", "train"]
    from cluster.checks import check_run
    from cluster.config import RunConfig, load

    config = load(RunConfig, str(ROOT / words[4]), words[5:])
    assert config.placement.by_role
    check_run(config, is_submitted=True)
    image = instructions()
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": f"local://{image['WORKDIR'][0]}"}


def test_roles_and_safety_are_those_of_ray_cluster_yaml(cluster):
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == VERSION
    groups = {group["labels"]["role"]: group for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]}
    gpus = {
        role: int(_container(group)["resources"]["limits"].get("nvidia.com/gpu", 0)) for role, group in groups.items()
    }
    nodes = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    assert gpus == {role: node["resources"].get("GPU", 0) for role, node in nodes.items()}
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    for role in ("rollout", "reward", "learner"):
        assert groups[role]["minReplicas"] == nodes[role]["min_workers"] == 0
        assert groups[role]["maxReplicas"] == nodes[role]["max_workers"]


def test_every_pod_mounts_the_claimed_volume_and_is_never_restarted_as_another_node(claim_and_cluster):
    """KubeRay asks for the latter with its second autoscaler, which knows labels."""
    name = claim_and_cluster["PersistentVolumeClaim"]["metadata"]["name"]
    assert claim_and_cluster["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = claim_and_cluster["RayCluster"]["spec"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [name]
        assert _container(group)["volumeMounts"] == [{"name": pod["volumes"][0]["name"], "mountPath": "/shared"}]
        assert pod["restartPolicy"] == "Never"


def instructions():
    """Return a Dockerfile's instructions, name -> arguments in their order."""
    text = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest)
    return found


def test_the_image_is_rays_with_the_tested_versions():
    image = instructions()
    assert set(image) == {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    assert f"RAY_VERSION={VERSION}" in image["ARG"]
    assert image["FROM"] == ["rayproject/ray:${RAY_VERSION}-py311-${PLATFORM}"]
    assert all("--constraint constraints.txt" in command for command in image["RUN"])
    sources = [shlex.split(copied)[1:-1] for copied in image["COPY"]]
    assert all((ROOT / source).exists() for words in sources for source in words)
    assert "RAY_AUTH_MODE=token" in image["ENV"][0]


def test_the_images_context_leaves_out_what_is_not_the_projects():
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    kept = ("actors", "cluster", "constraints.txt", "examples", "pyproject.toml", "README.md", "LICENSE")
    assert not set(kept) & set(ignored)
