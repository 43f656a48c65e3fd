"""Speed and memory of both twins and of transformers, on the same weights, side by side in one run.

`bench` in `running` gives the figures: `cases` says what is measured, `process` and `worker` keep each
framework in a process of its own, the `*_side` files run one measurement each, `cost` says what the work must
read or compute at the least, `page` and `plots` show it.
"""
