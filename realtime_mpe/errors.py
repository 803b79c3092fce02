"""The one exception that reaches people."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the offending value and the way out."""
