/* The instructions of AMX that models/native/tiles.h uses, in plain C: its path for the unit runs where there is none.
 * Intel 64 and IA-32 manual, volume 2: TILELOADD, TILESTORED, TILEZERO, TDPBF16PS.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILE_ROWS = 16, TILE_BYTES = 64 };
static _Thread_local uint8_t emulated_tiles[8][TILE_ROWS][TILE_BYTES];

static inline void emulated_load(int tile, const void *from, long stride) {
    for (long row = 0; row < TILE_ROWS; row++)
        memcpy(emulated_tiles[tile][row], (const char *)from + row * stride, TILE_BYTES);
}

static inline void emulated_store(int tile, void *to, long stride) {
    for (long row = 0; row < TILE_ROWS; row++) memcpy((char *)to + row * stride, emulated_tiles[tile][row], TILE_BYTES);
}

static inline float emulated_bf16(const uint8_t *bytes) {
    uint8_t wide[4] = {0, 0, bytes[0], bytes[1]};
    float value;
    memcpy(&value, wide, sizeof value);
    return value;
}

/* c (16, 16) += a (16, 32) b (32, 16), b in pairs. */
static inline void emulated_product(int c, int a, int b) {
    for (long row = 0; row < TILE_ROWS; row++)
        for (long column = 0; column < TILE_BYTES / 4; column++) {
            float sum;
            memcpy(&sum, emulated_tiles[c][row] + 4 * column, sizeof sum);
            for (long k = 0; k < TILE_ROWS; k++)
                for (long half = 0; half < 4; half += 2)
                    sum += emulated_bf16(emulated_tiles[a][row] + 4 * k + half) *
                           emulated_bf16(emulated_tiles[b][k] + 4 * column + half);
            memcpy(emulated_tiles[c][row] + 4 * column, &sum, sizeof sum);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_zero
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(emulated_tiles[tile], 0, sizeof emulated_tiles[tile])
#define _tile_loadd(tile, from, stride) emulated_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) emulated_product(c, a, b)
