"""What can go wrong while judging."""


class RewardError(RuntimeError):
    """A judge did not return a usable score for each response; never replaced by zeros.

    An outage is none: it crosses as ConnectionError, TimeoutError or out of memory (`reward.functions`).

    Args:
        component: name of the judge in the configuration.
        prompt_id: whose responses it judged.
        problem: `<what> must be <rule>, got <value>`.
    """

    def __init__(self, component: str, prompt_id: str, problem: str) -> None:
        super().__init__(component, prompt_id, problem)  # all arguments, so that the error can be pickled
        self.component = component
        self.prompt_id = prompt_id
        self.problem = problem

    def __str__(self) -> str:
        return f"reward component {self.component!r}, prompt {self.prompt_id!r}: {self.problem}"
