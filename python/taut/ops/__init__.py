"""One module per op: its contract (checks, fake, autograd, float64 reference, cost).

``torch.ops.taut.<op>`` is what modules call; ``taut.ops.<op>.<op>`` checks its arguments first and raises ``ValueError``.
"""
