"""Errors a user can mend."""


class UserError(ValueError):
    """One sentence a user can act on: what was received, what was expected, what to do. Scripts print it and end with status 2."""
