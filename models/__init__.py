"""Sparse decoder-only language models in plain torch: DeepSeekMoE experts and Engram memory.

Nothing here knows processes, config frameworks or logging. Reading order: `transformer` (the figure: embed ->
[engram] -> attention -> feed-forward or experts -> head), `hyper_connections`, `stream_kernels`, `attention`, `mla`,
`softmax_attention`, `rotary`, `norm`, `feed_forward`, `router`, `baseline_routers`, `moe`, `expert_kernels`,
`ngram_hash`, `engram`, `over_encoding`, `lazy_adam`, `memory_table`, `loss`, `precision`, `initialize`, `accounting`,
`activations`, `compiled` (torch.compile); the folders `native` and `kernels` hold kernels in C for CPUs and in Triton
for GPUs; `expert_choice` times the experts' kernels.

Shape letters used everywhere:
    B batch (sequences)      S sequence positions     T = B * S tokens
    D d_model                F width of a feed-forward or expert      V vocabulary
    H heads                  C width of a query or key head    W width of a value head (C in grouped-query attention)
    E routed experts         K top_k
    N n-gram orders          G hash heads per order   R = N * G table rows read per token and layer
    M width of one row       J residual streams or branches (hyper-connections; 1 for the plain residual)
"""
