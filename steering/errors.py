"""What a request may be refused for."""

from __future__ import annotations


class SteeringError(ValueError):
    """A request's ``steering`` field cannot be honoured.

    Attributes:
        code: one of the codes of the error table, e.g. ``feature_out_of_range``.
        message: one readable sentence with the value and the limit.
        param: path of the offending part, e.g. ``steering.interventions[0].feature``.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[type[SteeringError], tuple[str, str, str | None]]:
        return (SteeringError, (self.code, self.message, self.param))
