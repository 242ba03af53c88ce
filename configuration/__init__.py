"""The GDA configuration: fields, rules and derived shapes."""

from .configuration_gda import GDAConfig

__all__ = ["GDAConfig"]
