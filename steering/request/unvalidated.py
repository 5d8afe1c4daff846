"""A body's `steering` member, which is validated later but described in OpenAPI as it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from steering.request.shape import SteeringShape


@dataclass(frozen=True)
class UnvalidatedSteering:
    """An annotation: any value is let through; OpenAPI shows the shape that is validated later.

    Attributes:
        optional: whether null stands for a field that is left out.
    """

    optional: bool = False

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.any_schema()

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        shape: JsonSchemaValue = handler(SteeringShape.__pydantic_core_schema__)
        return {"anyOf": [shape, {"type": "null"}]} if self.optional else shape
