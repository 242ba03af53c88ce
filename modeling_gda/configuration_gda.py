# Saving a model replaces this file by the one that it imports.
from gda.configuration.configuration_gda import WHOLE, GDAConfig

__all__ = ["WHOLE", "GDAConfig"]
