"""The Triton kernels of scan_triton.py: one program runs one group in one direction, for BLOCK_E channels.

    forward     s_t = decay_t * s_{t-1} + B_t ⊗ (dt_t u_t),   decay_t = exp(dt_t A),   y_t = C_t . s_t
    backward    g_t = C_t ⊗ dy_t + decay_{t+1} * g_{t+1}, the gradient of s_t; from the last step to the first

A program is one warp; it goes through time step by step, its state (BLOCK_S, BLOCK_E) in registers. Steps come in
chunks of CHUNK, a compile-time number, so that Triton can fetch rows ahead (num_stages); beyond a group's end they are
masked: with dt = 0 nothing changes. The loop over chunks is a `while`, because a compile-time bound would compile anew
for each slide, and because Triton's interpreter, on which the tests run, has run-time `for` bounds only with some
versions of numpy. There are no atomics: a program writes only what is its own, and PyTorch sums it in a fixed order.

Shapes: K directions, N instances, G groups, E inner width, S state size. Rows are those of (K N, ·) arrays.
`plan` (K, G, 5) int64 is scan_triton.Plan's. A, kept states and state gradients have E innermost: (·, S, E).
"""

import triton
import triton.language as tl


@triton.jit
def scan_forward(
    u,  # (K N, E)
    dt,  # (K N, E)
    A,  # (K, S, E)
    B,  # (K N, S)
    C,  # (K N, S)
    y,  # (K N, E), written
    kept,  # (K chunks, S, E), written if KEEP: the state before each chunk
    plan,
    KEEP: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STATE: tl.constexpr,
):
    g, k = tl.program_id(1), tl.program_id(2)
    plan += (k * tl.num_programs(1) + g) * 5
    row, direction, steps, chunk = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    tile = s[:, None] * E + e[None, :]
    in_tile = (s[:, None] < S) & (e[None, :] < E)

    a = tl.load(A + k * S * E + tile, in_tile, other=0.0).to(STATE)
    state = tl.zeros((BLOCK_S, BLOCK_E), STATE)
    first = 0  # step of the chunk at hand
    while first < steps:
        if KEEP:
            tl.store(kept + chunk * S * E + tile, state, in_tile)
            chunk += 1
        for i in tl.range(CHUNK, num_stages=3):
            at = row + (first + i) * direction
            now = first + i < steps
            in_s, in_e = s < tl.where(now, S, 0), e < tl.where(now, E, 0)  # none beyond the group's end
            dt_t = tl.load(dt + at * E + e, in_e, other=0.0).to(STATE)
            u_t = tl.load(u + at * E + e, in_e, other=0.0).to(STATE)
            B_t = tl.load(B + at * S + s, in_s, other=0.0).to(STATE)
            C_t = tl.load(C + at * S + s, in_s, other=0.0).to(STATE)
            state = tl.exp(dt_t[None, :] * a) * state + B_t[:, None] * (dt_t * u_t)[None, :]
            tl.store(y + at * E + e, tl.sum(C_t[:, None] * state, 0), in_e)
        first += CHUNK


@triton.jit
def scan_backward(
    u,  # (K N, E)
    dt,  # (K N, E)
    A,  # (K, S, E)
    B,  # (K N, S)
    C,  # (K N, S)
    dy,  # (K N, E)
    kept,  # (K chunks, S, E)
    states,  # (K scratch, S, E), scratch: the states before each step of the chunk at hand
    g_u,  # (K N, E), written, as the following ones
    g_dt,  # (K N, E)
    g_A,  # (G, K, S, E), to be summed over G
    g_B,  # (E blocks, K N, S), to be summed over E blocks
    g_C,  # (E blocks, K N, S), likewise
    plan,
    rows,  # K N
    E: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STATE: tl.constexpr,
):
    g, k = tl.program_id(1), tl.program_id(2)
    plan += (k * tl.num_programs(1) + g) * 5
    row, direction, steps, chunk = tl.load(plan), tl.load(plan + 1), tl.load(plan + 2), tl.load(plan + 3)
    scratch = tl.load(plan + 4)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    tile = s[:, None] * E + e[None, :]
    in_tile = (s[:, None] < S) & (e[None, :] < E)
    g_B += tl.program_id(0).to(tl.int64) * rows * S
    g_C += tl.program_id(0).to(tl.int64) * rows * S
    states += scratch * S * E

    a = tl.load(A + k * S * E + tile, in_tile, other=0.0).to(STATE)
    grad = tl.zeros((BLOCK_S, BLOCK_E), STATE)  # decay_{t+1} * g_{t+1}: all that later steps say about s_t
    grad_A = tl.zeros((BLOCK_S, BLOCK_E), STATE)
    chunk += (steps - 1) // CHUNK
    first = (steps - 1) // CHUNK * CHUNK
    while first >= 0:
        state = tl.load(kept + chunk * S * E + tile, in_tile, other=0.0)
        for i in tl.range(CHUNK, num_stages=3):  # the states once more
            at = row + (first + i) * direction
            now = first + i < steps
            in_s, in_e = s < tl.where(now, S, 0), e < tl.where(now, E, 0)  # none beyond the group's end
            tl.store(states + i * S * E + tile, state, in_s[:, None] & in_e[None, :])
            dt_t = tl.load(dt + at * E + e, in_e, other=0.0).to(STATE)
            u_t = tl.load(u + at * E + e, in_e, other=0.0).to(STATE)
            B_t = tl.load(B + at * S + s, in_s, other=0.0).to(STATE)
            state = tl.exp(dt_t[None, :] * a) * state + B_t[:, None] * (dt_t * u_t)[None, :]
        tl.debug_barrier()  # all threads' states are written before any is read
        for j in tl.range(CHUNK, num_stages=3):
            i = CHUNK - 1 - j
            at = row + (first + i) * direction
            now = first + i < steps
            in_s, in_e = s < tl.where(now, S, 0), e < tl.where(now, E, 0)  # none beyond the group's end
            dt_t = tl.load(dt + at * E + e, in_e, other=0.0).to(STATE)
            u_t = tl.load(u + at * E + e, in_e, other=0.0).to(STATE)
            B_t = tl.load(B + at * S + s, in_s, other=0.0).to(STATE)
            C_t = tl.load(C + at * S + s, in_s, other=0.0).to(STATE)
            dy_t = tl.load(dy + at * E + e, in_e, other=0.0).to(STATE)
            before = tl.load(states + i * S * E + tile, in_s[:, None] & in_e[None, :], other=0.0)
            du_t = dt_t * u_t
            decay = tl.exp(dt_t[None, :] * a)
            after = decay * before + B_t[:, None] * du_t[None, :]
            grad += C_t[:, None] * dy_t[None, :]  # g_t
            g_du = tl.sum(grad * B_t[:, None], 0)
            tl.store(g_B + at * S + s, tl.sum(grad * du_t[None, :], 1), in_s)
            tl.store(g_C + at * S + s, tl.sum(after * dy_t[None, :], 1), in_s)
            grad *= decay
            g_dtA = grad * before
            grad_A += g_dtA * dt_t[None, :]
            tl.store(g_u + at * E + e, g_du * dt_t, in_e)
            tl.store(g_dt + at * E + e, tl.sum(g_dtA * a, 0) + g_du * u_t, in_e)
        tl.debug_barrier()  # and read before the next chunk's overwrite them
        chunk -= 1
        first -= CHUNK
    tl.store(g_A + (g * tl.num_programs(2) + k).to(tl.int64) * S * E + tile, grad_A, in_tile)
