"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """Says what was got, what is accepted and what to do. The command line prints it in one line and
    exits with code 2."""
