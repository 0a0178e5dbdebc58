"""The one exception type that users are meant to read."""


class RlkvError(ValueError):
    """Bad input or an unsupported combination.

    The message is one line: it names the file or flag, says what was given, what is allowed and
    how to fix it. The command line prints it without a traceback and exits with status 2.
    """
