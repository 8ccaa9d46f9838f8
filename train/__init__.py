"""How a model is trained: data, the DeepSpeed engine, the loop, checkpoints and metrics."""
