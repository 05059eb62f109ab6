"""What machines a run may have: this one, a live Ray cluster's, or ones that are described in a line or a file.

    8xH100-80GB                              one node with 8 GPUs
    8x8xH100-80GB,96cpu,1000GB               8 such nodes, each with 96 cores and 1000 GB of main memory
    2x8xH100,role=learner+4x16cpu,64GB       two nodes with GPUs and a label, four without GPUs

A GB is 10^9 bytes, of which a GPU has a little more than its name says: what is planned to fit does.  Nothing heavy is
imported, ray only for a live cluster.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.bundles import Node
from cluster.config import ConfigError

GB = 10**9

GPU_BYTES = {
    "A10G": 24 * GB, "A100-40G": 40 * GB, "A100-80G": 80 * GB, "B200": 180 * GB, "B300": 270 * GB, "GB200": 186 * GB,
    "H100": 80 * GB, "H200": 141 * GB, "L4": 24 * GB, "L40S": 48 * GB, "RTX-PRO-6000": 96 * GB, "T4": 16 * GB,
}  # fmt: skip
"""Memory of GPUs by Ray's names for them, where the name says it; V100 and A100 were sold with several."""

_OF_INSTANCES = {
    "g4dn": "T4", "g5": "A10G", "g6": "L4", "g6e": "L40S", "p4d": "A100-40G", "p4de": "A100-80G", "p5": "H100",
    "p5e": "H200", "p5en": "H200", "p6-b200": "B200", "p6-b300": "B300",
}  # fmt: skip
"""Family of AWS instances -> their GPUs."""

_CPUS_PER_GPU = 8
_STORE_SHARE = 0.3
_MAX_STORE_BYTES = 200 * GB
_GPU_LABEL = "ray.io/accelerator-type"
_SYNTAX = "write it like 8xH100-80GB, 2x8xH100-80GB,96cpu,1000GB or 2x8xH100+4x16cpu,64GB, or name a YAML file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Nodes, and where that is known from."""

    nodes: tuple[Node, ...]
    source: str
    notes: tuple[str, ...] = ()
    """What was assumed."""
    free: tuple[Node, ...] | None = field(default=None)
    """The nodes with what nobody uses now, where others use them too."""

    @property
    def cores(self) -> int:
        """Return the cores of all nodes."""
        return max(1, int(sum(node.cpus for node in self.nodes)))

    @property
    def node_cores(self) -> int:
        """Return the cores of the smallest node that has some."""
        return min((int(node.cpus) for node in self.nodes if node.cpus >= 1), default=1)

    @property
    def num_gpus(self) -> float:
        """Return the GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def this_machine() -> Hardware:
    """Return this machine; GPUs as nvidia-smi reports them."""
    found = gpus()
    sizes = [size for _, size in found]
    memory = main_memory()
    node = Node(
        name="this machine",
        cpus=os.cpu_count() or 1,
        gpus=len(found),
        gpu_bytes=min(sizes, default=None),
        memory_bytes=memory,
        object_store_bytes=_store_bytes(memory),
        labels={_GPU_LABEL: found[0][0]} if found else {},
    )
    return Hardware(nodes=(node,), source="this machine")


def gpus() -> list[tuple[str, int]]:
    """Return name and bytes of memory of each GPU of this machine, none where nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    return [
        (name.strip(), int(float(size)) * 2**20) for name, _, size in rows if size.strip().replace(".", "").isdigit()
    ]


def main_memory() -> int | None:
    """Return the bytes of this machine's memory, or of its control group's where that is less; None = not known."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no such group, or its limit is the word max
        return total


def described(text: str) -> Hardware:
    """Return machines from a line or from a YAML file: nodes of one's own, or a Ray cluster's `available_node_types`.

    Raises:
        ConfigError: when it is neither, with what it should look like.
    """
    if not os.path.isfile(text):
        parts = [_nodes_of(part.strip(), text) for part in text.split("+")]
        return Hardware(nodes=_named(parts), source=text, notes=_assumed(text))
    import yaml

    try:
        with open(text, encoding="utf-8") as file:
            content: Any = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} must be YAML: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("available_node_types"), dict):
        types = [_node_type(name, kind) for name, kind in content["available_node_types"].items()]
        return Hardware(nodes=_named(types), source=text, notes=("as many nodes of each type as max_workers allows",))
    if isinstance(content, dict) and isinstance(content.get("nodes"), list) and content["nodes"]:
        return Hardware(nodes=_named([_nodes_from(entry, text) for entry in content["nodes"]]), source=text)
    raise ConfigError(f"{text} must have a list `nodes`, or be a Ray cluster's YAML; {_SYNTAX}")


def live_nodes(*, free: bool = False) -> tuple[Node, ...]:
    """Return the living nodes of the Ray cluster that this process has joined, or what is free of them."""
    return tuple(live_nodes_by_id(free=free).values())


def live_nodes_by_id(*, free: bool = False) -> dict[str, Node]:
    """Return `live_nodes` by Ray's ids."""
    import ray
    from ray._private.state import available_resources_per_node  # ray's public functions sum over nodes

    left: Mapping[str, Mapping[str, float]] = available_resources_per_node() if free else {}
    return {
        found["NodeID"]: node_of(
            found["NodeManagerAddress"],
            found["Resources"],
            found.get("Labels"),
            free=left.get(found["NodeID"], {}) if free else None,
        )
        for found in ray.nodes()
        if found["Alive"]
    }


def node_of(
    name: str,
    total: Mapping[str, float],
    labels: Mapping[str, str] | None,
    *,
    free: Mapping[str, float] | None = None,
) -> Node:
    """Return a node as Ray describes it.

    Args:
        name: of the node.
        total: its resources.
        labels: its labels.
        free: of the resources, what the result shall have; None = all.
    """
    resources = total if free is None else free
    known = {key: value for key, value in (labels or {}).items() if key != "ray.io/node-id"}
    kinds = [resource.partition(":")[2] for resource in total if resource.startswith("accelerator_type:")]
    memory, store = total.get("memory"), total.get("object_store_memory")
    return Node(
        name=name,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        gpu_bytes=GPU_BYTES.get(kinds[0] if kinds else known.get(_GPU_LABEL, "")),
        # Ray counts what tasks may take apart from its store.
        memory_bytes=int(memory + (store or 0)) if memory else None,
        object_store_bytes=int(store) if store else None,
        labels=known,
    )


def live_cluster(address: str) -> Hardware:
    """Join a Ray cluster, look at it and leave it again; nothing is started there.

    Raises:
        ConfigError: when there is none.
    """
    import logging

    import ray

    had = ray.is_initialized()
    try:
        if not had:
            ray.init(address=address, namespace="concord", log_to_driver=False, logging_level=logging.ERROR)
        return Hardware(nodes=live_nodes(), free=live_nodes(free=True), source=f"the Ray cluster at {address}")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--address must be a Ray cluster that answers, got {address!r} ({str(error).splitlines()[0]}); start one "
            "with `ray start --head`, or describe it with --cluster"
        ) from error
    finally:
        if not had and ray.is_initialized():
            ray.shutdown()


def _nodes_of(text: str, whole: str) -> tuple[Node, int]:
    """Return a node of a part like `2x8xH100-80GB,96cpu,1000GB,role=learner`, and how many of them there are."""
    count = re.match(r"(\d+)x(?=\d)", text)
    node = Node(name="", cpus=0.0)
    for item in text[count.end() if count else 0 :].split(","):
        node = _with_item(node, item.strip(), whole)
    if not node.cpus:
        node = replace(node, cpus=_CPUS_PER_GPU * node.gpus)
    if not node.cpus:
        raise ConfigError(f"--cluster must describe nodes with GPUs or cores, got {text!r} in {whole!r}; {_SYNTAX}")
    return node, int(count[1]) if count else 1


def _with_item(node: Node, item: str, whole: str) -> Node:
    if found := re.fullmatch(r"(\d+)x([A-Za-z][\w.-]*?)(?:-(\d+)GB)?", item):
        size = int(found[3]) * GB if found[3] else GPU_BYTES.get(found[2].upper())
        if size is None:
            raise ConfigError(
                f"--cluster must name a GPU's memory, like {item}-80GB, where it does not follow from its name "
                f"({', '.join(GPU_BYTES)}), got {item!r} in {whole!r}"
            )
        return replace(node, gpus=int(found[1]), gpu_bytes=size, labels={**node.labels, _GPU_LABEL: found[2]})
    if found := re.fullmatch(r"(\d+)cpus?", item):
        return replace(node, cpus=int(found[1]))
    if found := re.fullmatch(r"(\d+)GB", item):
        memory = int(found[1]) * GB
        return replace(node, memory_bytes=memory, object_store_bytes=_store_bytes(memory))
    if found := re.fullmatch(r"([\w.\-/]+)=([\w.\-]+)", item):
        return replace(node, labels={**node.labels, found[1]: found[2]})
    raise ConfigError(f"--cluster must be a description of nodes or a file, got {item!r} in {whole!r}; {_SYNTAX}")


def _assumed(text: str) -> tuple[str, ...]:
    notes = []
    if any("cpu" not in part for part in text.split("+")):
        notes.append(f"{_CPUS_PER_GPU} cores for each GPU, where none are named (like 96cpu)")
    if any(not re.search(r"(?:^|,|x)\d+GB", part) for part in text.split("+")):
        notes.append("main memory is not checked where none is named (like 1000GB)")
    return tuple(notes)


def _nodes_from(entry: Any, path: str) -> tuple[Node, int]:
    """Return a node of an entry like {count: 2, gpus: 8, gpu_gb: 80, cpus: 96, memory_gb: 1000, labels: {...}}."""
    known = ("count", "gpus", "gpu_gb", "cpus", "memory_gb", "labels")
    unknown = sorted(set(entry) - set(known)) if isinstance(entry, dict) else [repr(entry)]
    if unknown:
        raise ConfigError(f"{path}: a node must have the keys {', '.join(known)}, got {', '.join(unknown)}")
    numbers = {key: value for key, value in entry.items() if key != "labels"}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"{path}: nodes.{key} must be a number that is not negative, got {value!r}")
    if numbers.get("gpus") and "gpu_gb" not in numbers:
        raise ConfigError(f"{path}: nodes.gpu_gb must be set where gpus are: the memory of one, 10^9 bytes")
    memory = int(numbers["memory_gb"] * GB) if "memory_gb" in numbers else None
    count_of_gpus = numbers.get("gpus", 0)
    node = Node(
        name="",
        cpus=numbers["cpus"] if "cpus" in numbers else max(1, _CPUS_PER_GPU * count_of_gpus),
        gpus=count_of_gpus,
        gpu_bytes=int(numbers["gpu_gb"] * GB) if count_of_gpus else None,
        memory_bytes=memory,
        object_store_bytes=_store_bytes(memory),
        labels={str(key): str(value) for key, value in (entry.get("labels", {})).items()},
    )
    return node, int(numbers["count"]) if "count" in numbers else 1


def _node_type(name: str, kind: Mapping[str, Any]) -> tuple[Node, int]:
    """Return a node of a Ray cluster's YAML; a type without a number of workers, like the head's, is there once."""
    resources: Mapping[str, float] = kind.get("resources", {})
    labels = {str(key): str(value) for key, value in (kind.get("labels", {})).items()}
    memory = int(resources["memory"]) if "memory" in resources else None
    node = Node(
        name=name,
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        gpu_bytes=_gpu_bytes(kind, labels),
        memory_bytes=memory,
        object_store_bytes=_store_bytes(memory),
        labels=labels,
    )
    return node, int(kind["max_workers"]) if "max_workers" in kind else 1


def _gpu_bytes(kind: Mapping[str, Any], labels: Mapping[str, str]) -> int | None:
    """Return the memory of a node type's GPUs by its label or its AWS instance, None where neither says it."""
    settings = kind.get("node_config") or {}
    family = str(settings.get("InstanceType")).partition(".")[0]
    return GPU_BYTES.get(labels.get(_GPU_LABEL) or _OF_INSTANCES.get(family) or "")


def _named(parts: list[tuple[Node, int]]) -> tuple[Node, ...]:
    nodes = [node for node, count in parts for _ in range(count)]
    return tuple(replace(node, name=f"{node.name or 'node'}-{number}") for number, node in enumerate(nodes))


def _store_bytes(memory: int | None) -> int | None:
    """Return what Ray gives its object store of a node's memory, unless it is told otherwise."""
    return None if memory is None else int(min(_STORE_SHARE * memory, _MAX_STORE_BYTES))
