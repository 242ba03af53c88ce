from gda.configuration.configuration_gda import GDAConfig  # saving a model replaces this file by the one it imports

__all__ = ["GDAConfig"]
