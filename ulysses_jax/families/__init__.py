"""Other people's models, as data: a config.json and its `Model`, and what tensors hold.

Nothing here reads weights or knows of devices: `interop` does.
"""
