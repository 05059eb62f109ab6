"""The smallest run in RLlib's manner: two layers, four prompts."""

import json

from cluster.rllib import RLHFConfig

ARCHITECTURE = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 6}


def toy_config(directory, **run):
    """Return a configuration of a run whose files are in `directory`."""
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcd"))
    return (
        RLHFConfig()
        .model({"architecture": ARCHITECTURE, "tokenizer": {"characters": "abcd"}})
        .prompts(path=str(prompts))
        .rollouts(prompts_per_step=4, samples_per_prompt=4, max_new_tokens=6, max_rows=8)
        .reward(components={"share": {"function": "tests.rules:share_of_a"}})
        .learners(backend="local", optimizer={"learning_rate": 3e-3})
        .run(**{"num_steps": 3, "checkpoint_every": 1, **run})
    )
