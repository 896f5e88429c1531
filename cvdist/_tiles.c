/* The restart-marker crop: cuts the tiles under a box out of a baseline JPEG, into a smaller JPEG that any decoder accepts.
 *
 * Where the restart interval divides the MCUs of a row, a baseline JPEG is a grid of tiles that are decoded without each other:
 * every restart marker ends the entropy-coded segment on a byte and resets the DC predictors (ITU-T T.81, sections B.2.4.4, E.1.4
 * and F.1.1.5.1). What is done here: find the markers, copy the segments of the tiles under the box, number their markers anew, and
 * write the new height and width into the frame header. Plain C that crop.py calls by ctypes: nothing of Python is needed to build it.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t frame;  /* of the height in the frame header, which the width follows */
    int64_t scan;   /* of the first entropy-coded byte */
    int height, width, tile_height, tile_width, columns;
} Grid;

static int be16(const uint8_t *at) { return at[0] << 8 | at[1]; }

/* Reads the headers; 0 where the image is no grid of tiles. */
static int read_grid(const uint8_t *data, int64_t size, Grid *grid) {
    int components = 0, horizontal = 1, vertical = 1, interval = 0;
    int64_t at = 2;
    grid->frame = 0;
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    for (;;) {
        if (at + 4 > size || data[at] != 0xFF) return 0;
        int marker = data[at + 1], length = be16(data + at + 2);
        if (length < 2 || at + 2 + length > size) return 0;
        const uint8_t *body = data + at + 4;
        if (marker == 0xC0 || marker == 0xC1) {
            if (grid->frame || length < 8 || body[0] != 8) return 0;
            grid->frame = at + 5;
            grid->height = be16(body + 1);
            grid->width = be16(body + 3);
            components = body[5];
            if (components < 1 || components > 4 || length < 8 + 3 * components) return 0;
            for (int i = 0; i < components; i++) {
                int h = body[7 + 3 * i] >> 4, v = body[7 + 3 * i] & 15;
                if (h < 1 || h > 4 || v < 1 || v > 4) return 0;
                if (h > horizontal) horizontal = h;
                if (v > vertical) vertical = v;
            }
            if (components == 1) horizontal = vertical = 1; /* T.81, A.2.2: one component is not interleaved */
        } else if (marker >= 0xC2 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            return 0; /* progressive, lossless, arithmetic */
        } else if (marker == 0xDD) {
            if (length < 4) return 0;
            interval = be16(body);
        } else if (marker == 0xDA) {
            if (body[0] != components) return 0;
            at += 2 + length;
            break;
        } else if (marker < 0xC0 || (marker >= 0xD0 && marker <= 0xD9)) {
            return 0; /* nothing that has a length stands here */
        }
        at += 2 + length;
    }
    if (!grid->frame || !grid->height || !grid->width || !interval) return 0;
    int row_mcus = (grid->width + 8 * horizontal - 1) / (8 * horizontal);
    if (row_mcus % interval) return 0;
    grid->scan = at;
    grid->tile_height = 8 * vertical;
    grid->tile_width = 8 * horizontal * interval;
    grid->columns = row_mcus / interval;
    return 1;
}

/* Returns where the marker that ends a segment begins; -1 where there is none. */
static int64_t segment_end(const uint8_t *data, int64_t size, int64_t at) {
    for (;;) {
        const uint8_t *found = at < size ? memchr(data + at, 0xFF, (size_t)(size - at)) : NULL;
        if (!found || found + 1 >= data + size) return -1;
        if (found[1] != 0) return found - data;
        at = found - data + 2; /* a stuffed byte: T.81, B.1.1.5 */
    }
}

/* Writes the crop to `out`; returns its length, 0 where the data are not as the headers say. Never more than size + 2 bytes. */
static int64_t splice(const uint8_t *data, int64_t size, const Grid *grid, int c0, int c1, int r0, int r1, uint8_t *out) {
    int last = (r1 - 1) * grid->columns + c1 - 1, total = grid->columns * ((grid->height + grid->tile_height - 1) / grid->tile_height);
    int64_t at = grid->scan, filled = grid->scan;
    int column = 0, row = 0, taken = 0;
    memcpy(out, data, (size_t)grid->scan);
    for (int tile = 0; tile <= last; tile++) {
        int64_t end = segment_end(data, size, at);
        if (end < 0 || data[end + 1] != (tile == total - 1 ? 0xD9 : 0xD0 + (tile & 7))) return 0;
        if (row >= r0 && column >= c0 && column < c1) {
            memcpy(out + filled, data + at, (size_t)(end - at));
            filled += end - at;
            out[filled++] = 0xFF;
            out[filled++] = (uint8_t)(tile == last ? 0xD9 : 0xD0 + (taken++ & 7));
        }
        at = end + 2;
        if (++column == grid->columns) column = 0, row++;
    }
    return filled;
}

static int min_of(int a, int b) { return a < b ? a : b; }

/* Writes to `out` (size + 2 bytes) the smaller JPEG of the tiles under a box, and to `origin` the left and top of its pixels in the image.
 * Returns its length; 0 where the image is no grid of tiles or not as its headers say; -1 where the box is not within the image. */
int64_t crop(const uint8_t *data, int64_t size, int x, int y, int width, int height, uint8_t *out, int32_t *origin) {
    Grid grid = {0};
    if (!read_grid(data, size, &grid)) return 0;
    if (x < 0 || y < 0 || width < 1 || height < 1 || x > grid.width - width || y > grid.height - height) return -1;
    int c0 = x / grid.tile_width, c1 = (x + width + grid.tile_width - 1) / grid.tile_width;
    int r0 = y / grid.tile_height, r1 = (y + height + grid.tile_height - 1) / grid.tile_height;
    int left = c0 * grid.tile_width, top = r0 * grid.tile_height;
    int new_width = min_of(grid.width, c1 * grid.tile_width) - left, new_height = min_of(grid.height, r1 * grid.tile_height) - top;
    int64_t length = splice(data, size, &grid, c0, c1, r0, r1, out);
    out[grid.frame] = (uint8_t)(new_height >> 8), out[grid.frame + 1] = (uint8_t)new_height;
    out[grid.frame + 2] = (uint8_t)(new_width >> 8), out[grid.frame + 3] = (uint8_t)new_width;
    origin[0] = left, origin[1] = top;
    return length;
}
