"""Values: dataclasses that nobody changes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

__all__ = ["value_class"]

if TYPE_CHECKING:
    from dataclasses import dataclass as value_class
else:

    def value_class(*, frozen: bool, **options: Any) -> Any:
        """Make a dataclass that is frozen for mypy alone.

        One that is frozen for Python takes three times as long to make an object of: it sets each field
        through `object.__setattr__`.
        """
        return dataclass(unsafe_hash=frozen, **options)
