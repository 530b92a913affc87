"""The five resources of a model, base against swapped; see ``survey``."""
