"""Other people's models, and models without memory, as the start of a run.

Reading order: `configuration` (config.json to our shape), `layout` (which tensor goes where), `source` (reading
safetensors), `build` (the import itself), `report` (what became of every tensor). `train.start` begins a run from it.
"""
