"""The one base of errors that a user can put right."""


class UserError(ValueError):
    """Bad input: the message is one line, says what is wrong and what to do.

    Programs that run for a user print it without a traceback.
    """
