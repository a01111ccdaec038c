"""Floor 0: keys, Philox, draws and the keyed bijection. Nothing here holds state or knows a model.

The bits are written down in ``docs/contracts/randomness.md``. ``keys``, ``philox`` and ``permutation`` load
no torch.
"""
