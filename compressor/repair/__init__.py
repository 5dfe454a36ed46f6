"""What is left, put right: layers refitted in closed form, batch norm's statistics. Knows no units."""

from .compensation import CompensationOptions, compensate

__all__ = ["CompensationOptions", "compensate"]
