"""Groups taken through a ledger, as a run takes them."""


def train(ledger, names, step):
    """Take groups through a whole step."""
    begin(ledger, names)
    for name in names:
        ledger.batch(name, step)
    for name in names:
        ledger.train(name, step)


def begin(ledger, names):
    """Take groups to SCORED."""
    for name in names:
        ledger.accept(name)
        lease = ledger.lease(name, "rollout-0.0", 0, 0)
        ledger.generated(name, lease)
        ledger.scored(name, lease)
