"""What a request may be refused for: every code, and the exceptions that carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Literal

#: Every `error.code` of this project's own answers.
ErrorCode = Literal[
    "body_too_large",
    "budget_not_met",
    "condition_too_late",
    "duplicate_intervention",
    "feature_out_of_range",
    "ill_conditioned",
    "invalid_type",
    "invalid_value",
    "invalid_weights",
    "max_act_unknown",
    "misplaced_steering",
    "presets_read_only",
    "sae_required",
    "steering_unavailable",
    "study_too_large",
    "too_many_interventions",
    "too_many_presets",
    "unknown_field",
    "unknown_preset",
    "unknown_sae",
    "unsupported_combination",
    "unsupported_op",
]


class SteeringError(ValueError):
    """A request cannot be honoured as it stands.

    Attributes:
        status: the status of the HTTP answer.
        code: what is wrong, for programs.
        message: one readable sentence with the value and the limit.
        param: path of the offending part, e.g. ``steering.interventions[0].feature``.
    """

    status: ClassVar[HTTPStatus] = HTTPStatus.BAD_REQUEST

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.param = param

    @property
    def details(self) -> Mapping[str, Any]:
        """What the answer's `error` has besides message, type, param and code."""
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.code, self.message, self.param))


class NotFoundError(SteeringError):
    """A name or an index in the URL's path does not exist."""

    status = HTTPStatus.NOT_FOUND


class ForbiddenError(SteeringError):
    """This server does not allow what the request asks for."""

    status = HTTPStatus.FORBIDDEN


class BodyTooLargeError(SteeringError):
    """The request's body is larger than the server reads."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BudgetNotMetError(SteeringError):
    """No strength of an edit keeps a study's budget.

    Attributes:
        curve: what was tried, as the answer would have it.
    """

    def __init__(
        self, message: str, param: str | None = None, curve: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        super().__init__("budget_not_met", message, param)
        self.curve = curve

    @property
    def details(self) -> Mapping[str, Any]:
        """The `curve`, which the answer's `error` has too."""
        return {"curve": self.curve}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.param, self.curve))
