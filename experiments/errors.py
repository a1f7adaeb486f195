"""The one exception whose message is meant for the person at the keyboard."""


class ExperimentError(Exception):
    """Something the user can mend: the message names what, its value and the remedy.

    ``run.py`` prints the message alone, without a traceback, and exits with 2.
    """
