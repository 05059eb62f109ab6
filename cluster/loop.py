"""The loop, on one screen: what a training run is."""

from cluster.run import Run


def train(run: Run) -> None:
    """Run every step that is left, from where the last checkpoint stopped."""
    run.evaluate_start()
    for step in run.steps():
        train_step(run, step)
    run.finish()


def train_step(run: Run, step: int) -> dict[str, float]:
    """Sample, judge, learn, publish, and account for it; return the step's metrics."""
    batch = run.take_batch(step)
    result = run.learn(batch)
    run.publish(step)
    run.evaluate_if_due(step)
    metrics = run.record(step, batch, result)
    run.checkpoint_if_due(step)
    return metrics
