"""Sparse decoder-only language models in plain torch: DeepSeekMoE experts and Engram memory.

Nothing here knows processes, config frameworks or logging. Reading order: `transformer` (the figure: embed ->
[engram] -> attention -> feed-forward or experts -> head), `attention`, `norm`, `feed_forward`, `router`, `moe`,
`expert_kernels`, `ngram_hash`, `engram`, `memory_table`, `loss`, `precision`, `initialize`, `accounting`; the folder
`native` holds C kernels for CPUs.

Shape letters used everywhere:
    B batch (sequences)      S sequence positions     T = B * S tokens
    D d_model                F width of a feed-forward or expert      V vocabulary
    H heads                  C head_dim
    E routed experts         K top_k
    N n-gram orders          G hash heads per order   R = N * G table rows read per token and layer
    M width of one row       J residual branches (hyper-connections; 1 for the plain residual)
"""
