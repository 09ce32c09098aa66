"""A small process that outlives the trainer and finishes what it had staged (docs/design/003-keeper.md). No torch.

``client`` is the trainer's side, ``process`` the keeper itself, ``rescue`` what it does when the trainer is dead,
``offer`` how a restarted trainer gets the memory, ``held`` that memory, ``wire`` what they say to each other.
"""
