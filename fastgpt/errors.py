"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, why, and what would be accepted."""


class SaidElsewhere(UserError):
    """An error of a job of several processes that another process has met and says."""
