"""A failure that the host turns into one of its typed exceptions."""


class Failure(Exception):
    """Ends a verb with an error event.

    Args:
        error: Name of a class in ``edgeprune.errors``, e.g. ``"BoardFullError"``.
        message: One sentence: what must hold, and what was found.
        hint: The next step, or None.
        details: Further arguments of that class (``field``, ``needed``, ``found`` of ``IncompatibleTargetError``).
    """

    def __init__(self, error, message, hint=None, **details):
        Exception.__init__(self, message)
        self.error = error
        self.message = message
        self.hint = hint
        self.details = details

    def event(self):
        """The JSON-ready event that the host understands."""
        return {
            "event": "error",
            "error": self.error,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
        }
