"""A scripted world for the dispatcher: replies and the time go in, commands come out."""

from collections import defaultdict

from cluster.dispatcher import Dispatcher
from cluster.fleet import FleetConfig
from cluster.ledger import Ledger
from cluster.limits import Limits
from cluster.messages import Call, Failure, Kill, Role, Start, Verb, Weights

V0 = Weights(incarnation=0, version=0)
LIMITS = Limits(timeout_s=10.0, heartbeat_s=60.0, max_retries=3, max_quarantined=1)


class World:
    """Collects the dispatcher's commands, and answers them when told to."""

    def __init__(self, *, rollouts=2, max_rollouts=0, rewards=1, capacity=2, max_restarts=1, limits=LIMITS):
        self.ledger = Ledger()
        fleets = {
            role: FleetConfig(
                count=count, max_count=max_count, capacity=capacity, ready_timeout_s=30.0, max_restarts=max_restarts
            )
            for role, count, max_count in ((Role.ROLLOUT, rollouts, max_rollouts), (Role.REWARD, rewards, 0))
        }
        self.dispatcher = Dispatcher(fleets=fleets, limits=limits, ledger=self.ledger)
        self.now = 0.0
        self.open: dict[int, Call] = {}
        self.started: list[str] = []
        self.killed: list[str] = []
        self.sent: dict[str, list[str]] = defaultdict(list)
        self.tick(0.0)

    def collect(self):
        for command in self.dispatcher.take_commands():
            if isinstance(command, Start):
                self.started.append(str(command.worker))
            elif isinstance(command, Kill):
                self.killed.append(str(command.worker))
            else:
                self.open[command.call_id] = command
                self.sent[str(command.worker)].append(str(command.verb))

    def tick(self, now):
        self.now = now
        self.dispatcher.tick(now)
        self.collect()

    def calls(self, verb, worker=None):
        found = [call for call in self.open.values() if call.verb is verb]
        return [call for call in found if worker is None or str(call.worker) == worker]

    def answer(self, call, value="answer"):
        self.open.pop(call.call_id, None)
        self.dispatcher.replied(call.call_id, value, self.now)
        self.collect()

    def answer_all(self, *verbs):
        while found := [call for call in self.open.values() if call.verb in verbs]:
            self.answer(found[0], f"{found[0].verb} of {found[0].lease.group_id}" if found[0].lease else None)

    def fail(self, call, kind, text="because"):
        self.answer(call, Failure(kind=kind, text=text))

    def begin(self, *groups, weights=V0):
        """Bring everybody up with weights, and admit a round of groups."""
        self.answer_all(Verb.READY)
        self.dispatcher.publish(weights, "weights", self.now)
        self.collect()
        self.answer_all(Verb.LOAD)
        self.dispatcher.admit("round", {group: f"work {group}" for group in groups}, self.ledger, self.now)
        self.collect()
        return self.dispatcher.round("round")
