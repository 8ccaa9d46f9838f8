/* The routed experts of a whole MoE layer in one pass: tokens are gathered, multiplied, weighted and summed back
 * without leaving the cache. Definition: models/expert_kernels.py, `swiglu_loop` between `dispatch` and `combine`.
 *
 *     out_t = sum over the experts e of t of  w_te * down_e( silu(gate_e(x_t)) * up_e(x_t) )
 *
 * T tokens, K experts per token, E experts, D model width, F expert width. The master weights are read in fp32 and
 * their gradients written in fp32: no copy of them in bf16 is ever kept. Threads take parts of experts (experts.h).
 */
#include "experts.h"

/* Working memory of one thread in the forward pass. */
typedef struct {
    uint32_t *gate_up, *down; /* weights of the expert, in pairs */
    bf16 *rows, *hidden;
    float *sums, *results;
    Ahead ahead;
} Forward;

static Forward forward_room(Scratch *own, const Layer *layer) {
    return (Forward){room_for(own, layer->d * layer->g / 2, sizeof(uint32_t)),
                     room_for(own, layer->f * layer->d / 2, sizeof(uint32_t)),
                     take(own, ROWS * layer->d, sizeof(bf16)),
                     take(own, ROWS * layer->f, sizeof(bf16)),
                     room_for(own, ROWS * layer->g, sizeof(float)),
                     room_for(own, ROWS * layer->d, sizeof(float)),
                     {.end = 0}};
}

static void forward_part(const Layer *layer, const Order *order, const Part *part, Forward *own,
                         const Results *results, Sink sink, bf16 *restrict pre) {
    const long width = layer->width, hidden_width = layer->hidden_width, d = layer->d, f = layer->f, g = layer->g;
    const Tiles gate_up =
        tiles_of_floats(width, 2 * hidden_width, layer->gate_up + part->expert * layer->in, own->gate_up);
    const Tiles down = tiles_of_floats(hidden_width, width, layer->down + part->expert * layer->out, own->down);
    will_use_weights(&own->ahead, layer, order, part);
    for (long start = 0; start < part->count; start += step_of(part)) {
        const long count = smaller(step_of(part), part->count - start), first = part->first + start;
        const int32_t *tokens = order->tokens + first;
        const bf16 *rows = results->straight ? layer->x + first * d : own->rows;
        if (!results->straight) {
            gather(count, tokens, width, layer->x, own->rows);
            will_use_rows(&own->ahead, count, tokens, results->out, width * sizeof(float));
        }
        multiply_ahead(stepped(count), g, d, rows, d, gate_up, own->sums, g, 0, &own->ahead);
        for (long i = 0; i < count; i++)
            swiglu_row(hidden_width, layer->weights[order->pairs[first + i]], own->sums + i * g,
                       pre + (first + i) * 2 * hidden_width, own->hidden + i * f);
        multiply_ahead(stepped(count), d, f, own->hidden, f, down, rows_from(sink, layer, start), d, results->add,
                       &own->ahead);
        if (sink.turn) scatter(count, tokens, width, sink.rows, results->out);
    }
}

static Layer layer_of(long tokens, long top_k, long experts, long width, long hidden_width, const bf16 *x,
                      const float *weights, const float *gate_up, const float *down) {
    return (Layer){tokens, top_k, experts, width, hidden_width,
                   padded(width), padded(hidden_width), padded(2 * hidden_width),
                   width * 2 * hidden_width, hidden_width * width, x, weights, gate_up, down};
}

/* x (T, D), ids and weights (T, K), gate_up (E, D, 2F), down (E, F, D); adds to out (T, D), or writes it where `add`
 * is 0. Writes pre (T K, 2F) bf16, gate and up of every pair in the order of the experts, for the backward pass: to
 * compute them again costs a quarter of its products. 1: no memory. */
int experts_forward(long tokens, long top_k, long experts, long width, long hidden_width, const bf16 *x,
                    const int64_t *ids, const float *weights, const float *gate_up, const float *down,
                    long add, float *restrict out, bf16 *restrict pre) {
    const Layer layer = layer_of(tokens, top_k, experts, width, hidden_width, x, weights, gate_up, down);
    Scratch scratch = {0};
    const Order order = order_of(&scratch, &layer, ids);
    Results results = results_of(&scratch, &layer, &order, add, out);
    if (scratch.failed) return release(&scratch), 1;

    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch own = {0};
        Forward room = forward_room(&own, &layer);
        failed |= own.failed;
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (long i = 0; i < order.num_parts; i++) {
            const Part *part = order.parts + i;
            if (failed) continue;
            const Sink sink = sink_of(&results, &layer, &order, part, room.results);
            if (sink.rows == NULL) failed = 1;
            if (failed) continue;
            forward_part(&layer, &order, part, &room, &results, sink, pre);
            finish(&results, &layer, &order, part, sink);
        }
        tiles_end();
        release(&own);
    }
    free_unfinished(&results, &order);
    return release(&scratch), failed;
}

/* Working memory of one thread in the backward pass. */
typedef struct {
    uint32_t *gate_up, *down; /* transposed weights of the expert, in pairs */
    bf16 *zeros, *rows, *hidden, *grad_pre;
    bf16 *turned;    /* left operand of the weights' gradients, */
    uint32_t *right; /* and right one */
    float *grad_hidden, *results;
    float *sum_gate_up, *sum_down; /* where these gradients need padding */
    Ahead ahead;
} Backward;

static Backward backward_room(Scratch *own, const Layer *layer, int exact) {
    const long d = layer->d, f = layer->f, g = layer->g;
    return (Backward){room_for(own, d * g / 2, sizeof(uint32_t)),
                      room_for(own, f * d / 2, sizeof(uint32_t)),
                      take(own, d, sizeof(bf16)),
                      take(own, ROWS * d, sizeof(bf16)),
                      take(own, ROWS * f, sizeof(bf16)),
                      take(own, ROWS * g, sizeof(bf16)),
                      room_for(own, ROWS * (d > f ? d : f), sizeof(bf16)),
                      room_for(own, ROWS * (d > g ? d : g) / 2, sizeof(uint32_t)),
                      room_for(own, ROWS * f, sizeof(float)),
                      room_for(own, ROWS * d, sizeof(float)),
                      room_for(own, exact ? 0 : d * g, sizeof(float)),
                      room_for(own, exact ? 0 : f * d, sizeof(float)),
                      {.end = 0}};
}

/* What the backward pass is given and writes, beside the gradient of x. */
typedef struct {
    const bf16 *pre, *grad;
    float *weights;        /* (T, K) gradients */
    float *gate_up, *down; /* (E, D, 2F) and (E, F, D) */
    int exact;             /* D, F and 2F need no padding */
    float *more_gate_up, *more_down; /* (sums, d, g) and (sums, f, d): of the parts after the first of an expert */
} Gradients;

/* Products of `count` rows from `start` of a part. */
static void backward_rows(const Layer *layer, const Order *order, const Part *part, long start, long count,
                          Backward *own, Tiles gate_up, Tiles down, const Results *results, Sink sink,
                          const Gradients *grads, float *sum_gate_up, float *sum_down) {
    const long width = layer->width, hidden_width = layer->hidden_width, d = layer->d, f = layer->f, g = layer->g;
    const long height = padded(count), k = stepped(count), first = part->first + start;
    const int32_t *tokens = order->tokens + first;
    Ahead *ahead = &own->ahead;
    const bf16 *grad_rows = results->straight ? grads->grad + first * d : own->rows;
    if (!results->straight) {
        gather(count, tokens, width, grads->grad, own->rows);
        will_use_rows(ahead, count, tokens, layer->x, width * sizeof(bf16));
    }
    multiply_ahead(k, f, d, grad_rows, d, down, own->grad_hidden, f, 0, ahead);
    for (long i = 0; i < count; i++) {
        const long pair = order->pairs[first + i];
        grads->weights[pair] =
            swiglu_row_backward(hidden_width, layer->weights[pair], grads->pre + (first + i) * 2 * hidden_width,
                                own->grad_hidden + i * f, own->hidden + i * f, own->grad_pre + i * g);
    }
    memset(own->hidden + count * f, 0, (height - count) * f * sizeof(bf16));
    memset(own->grad_pre + count * g, 0, (height - count) * g * sizeof(bf16));
    if (!results->straight) will_use_rows(ahead, count, tokens, results->out, width * sizeof(float));
    multiply_ahead(k, d, g, own->grad_pre, g, gate_up, rows_from(sink, layer, start), d, results->add, ahead);
    if (sink.turn) scatter(count, tokens, width, sink.rows, results->out);

    gather_turned(count, tokens, width, layer->x, own->zeros, own->turned, height);
    const Tiles grad_pre = tiles_of(height, g, own->grad_pre, g, own->right);
    multiply_ahead(d, g, k, own->turned, height, grad_pre, sum_gate_up, g, start > 0, ahead);
    transpose(height, f, own->hidden, f, own->turned, height);
    const Tiles grad_out = tiles_of(height, d, grad_rows, d, own->right);
    multiply_ahead(f, d, k, own->turned, height, grad_out, sum_down, d, start > 0, ahead);
}

static void backward_part(const Layer *layer, const Order *order, const Part *part, Backward *own,
                          const Results *results, Sink sink, const Gradients *grads) {
    const long width = layer->width, hidden_width = layer->hidden_width, d = layer->d, f = layer->f, g = layer->g;
    float *into = grads->gate_up + part->expert * layer->in, *out_of = grads->down + part->expert * layer->out;
    if (part->count == 0) {
        memset(into, 0, layer->in * sizeof(float));
        memset(out_of, 0, layer->out * sizeof(float));
        return;
    }
    float *sum_gate_up = part->sum      ? grads->more_gate_up + (part->sum - 1) * d * g
                         : grads->exact ? into
                                        : own->sum_gate_up;
    float *sum_down = part->sum ? grads->more_down + (part->sum - 1) * f * d : grads->exact ? out_of : own->sum_down;
    const Tiles gate_up =
        tiles_of_turned_floats(width, 2 * hidden_width, layer->gate_up + part->expert * layer->in, own->gate_up);
    const Tiles down = tiles_of_turned_floats(hidden_width, width, layer->down + part->expert * layer->out, own->down);
    will_use_weights(&own->ahead, layer, order, part);
    for (long start = 0; start < part->count; start += step_of(part))
        backward_rows(layer, order, part, start, smaller(step_of(part), part->count - start), own, gate_up, down,
                      results, sink, grads, sum_gate_up, sum_down);
    if (grads->exact || part->sum) return;
    unpad(width, 2 * hidden_width, sum_gate_up, g, into);
    unpad(hidden_width, width, sum_down, d, out_of);
}

/* result (rows, columns) += sums of these padded sizes. All threads: each always takes the same rows, so none waits. */
static void add_sums(long rows, long columns, const float *sums, float *restrict result) {
#pragma omp for schedule(static) nowait
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < columns; i++) result[row * columns + i] += sums[row * padded(columns) + i];
}

/* The gradients of an expert's further parts, in their order. */
static void add_further_parts(const Layer *layer, const Order *order, const Gradients *grads) {
    for (const Part *part = order->parts; part < order->parts + order->num_parts; part++) {
        if (part->sum == 0) continue;
        add_sums(layer->width, 2 * layer->hidden_width, grads->more_gate_up + (part->sum - 1) * layer->d * layer->g,
                 grads->gate_up + part->expert * layer->in);
        add_sums(layer->hidden_width, layer->width, grads->more_down + (part->sum - 1) * layer->f * layer->d,
                 grads->down + part->expert * layer->out);
    }
}

/* grad (T, D) of out. Adds to grad_x (T, D), or writes it, as in the forward pass; writes grad_weights (T, K),
 * grad_gate_up and grad_down. 1: no memory. */
int experts_backward(long tokens, long top_k, long experts, long width, long hidden_width, const bf16 *x,
                     const int64_t *ids, const float *weights, const float *gate_up, const float *down, const bf16 *pre,
                     const bf16 *grad, long add, float *restrict grad_x, float *restrict grad_weights,
                     float *restrict grad_gate_up, float *restrict grad_down) {
    const Layer layer = layer_of(tokens, top_k, experts, width, hidden_width, x, weights, gate_up, down);
    const long d = layer.d, f = layer.f, g = layer.g;
    Scratch scratch = {0};
    const Order order = order_of(&scratch, &layer, ids);
    Results results = results_of(&scratch, &layer, &order, add, grad_x);
    const Gradients grads = {pre, grad, grad_weights, grad_gate_up, grad_down,
                             d * g == layer.in && f * d == layer.out,
                             room_for(&scratch, order.num_sums * d * g, sizeof(float)),
                             room_for(&scratch, order.num_sums * f * d, sizeof(float))};
    if (scratch.failed) return release(&scratch), 1;

    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Scratch own = {0};
        Backward room = backward_room(&own, &layer, grads.exact);
        failed |= own.failed;
        tiles_begin();
#pragma omp for schedule(dynamic)
        for (long i = 0; i < order.num_parts; i++) {
            const Part *part = order.parts + i;
            if (failed) continue;
            const Sink sink = sink_of(&results, &layer, &order, part, room.results);
            if (sink.rows == NULL) failed = 1;
            if (failed) continue;
            backward_part(&layer, &order, part, &room, &results, sink, &grads);
            finish(&results, &layer, &order, part, sink);
        }
        tiles_end();
        release(&own);
        add_further_parts(&layer, &order, &grads);
    }
    free_unfinished(&results, &order);
    return release(&scratch), failed;
}

/* Whether the matrix unit may be used; asks for it. */
int matrix_unit(void) { return tiles_allowed(); }

/* Whether the loops of these kernels can run in more than one thread. */
int several_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
