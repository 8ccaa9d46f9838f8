"""Memory tables whose rows do not lie on the device that trains: in this machine's RAM, or in a file on its disk.

`place` holds the settings, `host` the table, `store` where its arrays lie, `cache` the rows of a file kept in RAM,
`start_values` their first numbers, `rounding` fp32 -> bf16 without bias, `in_order` the thread beside the training
loop, `copies` the way to a GPU and back.
"""
