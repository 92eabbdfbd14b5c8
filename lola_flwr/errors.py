"""The base of errors that a user can put right, and what goes into messages."""


class UserError(ValueError):
    """Bad input: the message is one line, says what is wrong and what to do.

    Programs that run for a user print it without a traceback.
    """


def quoted(text: object) -> str:
    """Return what a device said, fit for a log line: on one line, and short."""
    return repr(str(text))[:200]
