"""What every section of the recipe is made from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A node of the tree: strict types, no extra keys, immutable once resolved."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        protected_namespaces=(),
        allow_inf_nan=False,
        serialize_by_alias=True,
    )
