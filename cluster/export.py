"""`concord export`: a checkpoint's policy as a Hugging Face directory, without a cluster."""

import json
import os

from cluster.config import ConfigError, RunConfig, load
from cluster.deliveries import delivered, fetched
from cluster.object_store import is_url, without_credentials
from cluster.remote_storage import open_storage


def export_policy(run_dir: str, output: str) -> str:
    """Write the newest checkpoint's policy to `output`; return the path.

    Raises:
        ConfigError: when the run has no whole checkpoint.
    """
    storage = open_storage(run_dir)
    newest = storage.newest_checkpoint()
    if newest is None:
        raise ConfigError(
            f"{storage.shown()} must hold a checkpoint to export, and has none; run at least run.checkpoint_every steps"
        )
    config = load(RunConfig, storage.path("config.yaml"))
    _, checkpoint = newest
    model_dir = storage.starting_model() or json.loads(storage.read_text(checkpoint, "run.json"))["model_dir"]
    if not os.path.isdir(model_dir):
        model_dir = _architecture(config, model_dir)
    from actors.weights import InProcessTransport
    from learner.learner import LearnerRank

    # One process in plain torch reads what any number of ranks at any ZeRO stage wrote.
    rank = LearnerRank(
        model_dir=model_dir,
        policy=config.policy,
        learner=config.learner.model_copy(update={"backend": "local", "num_ranks": 1}),
        algorithm=config.algorithm,
        temperature=config.rollouts.temperature,
        seed=config.run.seed,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=os.cpu_count() or 1,
        transport=InProcessTransport(),
        max_new_tokens=config.rollouts.max_new_tokens,
    )
    rank.load_state(fetched(checkpoint))
    with delivered(output) as local:
        rank.export_policy(local)
    rank.close()
    return without_credentials(output) if is_url(output) else os.path.abspath(output)


def _architecture(config: RunConfig, missing: str) -> str:
    """Return a model directory in place of one that is gone; the checkpoint holds every weight that was trained."""
    if config.learner.lora is not None:
        raise ConfigError(f"{missing} must be there to export adapters, which change its weights; train it again")
    from actors.cache import cache_directory
    from actors.policy import materialize

    return materialize(config.policy, seed=config.run.seed, cache_dir=cache_directory())
