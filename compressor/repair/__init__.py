"""What is left, put right: layers refitted in closed form, batch norm's statistics, fine-tuning. Knows no units."""

from .compensation import CompensationOptions, compensate

__all__ = ["CompensationOptions", "compensate"]
