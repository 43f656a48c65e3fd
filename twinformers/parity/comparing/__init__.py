"""The parts of `twinformers.compare` that `verify` has not: `tokens` follows both twins token by token,
`speed` measures each framework in a process of its own, and `sources` sets the twin files side by side.
"""
