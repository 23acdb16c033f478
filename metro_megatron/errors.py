"""What a user did wrong, said so that the user can put it right."""

from collections.abc import Sequence


class UserError(ValueError):
    """One or more problems with what the user gave; each names the value, the limit and the remedy.

    Command lines print the problems once and exit with code 2 (`EXIT_CODE`).
    """

    EXIT_CODE = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
