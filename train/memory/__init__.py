"""Memory tables beyond one process and one device: over all ranks, in this machine's RAM, or in a file on its disk.

`sharded` deals rows out over ranks; `place` holds the settings of where rows lie, `host` the table, `store` where its
arrays lie, `cache` the rows of a file kept in RAM, `start_values` their first numbers, `rounding` fp32 -> bf16 without
bias, `in_order` the thread beside the training loop, `copies` the way to a GPU and back.
"""
