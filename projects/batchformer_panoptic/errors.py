"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake in a command line, a config, a data set or a checkpoint.

    The message is one line: the offending value, and what to do about it. Commands print it
    without a traceback and exit with a non-zero status.
    """
