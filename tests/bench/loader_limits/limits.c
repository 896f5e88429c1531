/* What decoding a region of a JPEG costs at least: bytes in memory, one thread, no checks. tests/bench/peers/bare.py calls it.
 *
 * Fast DCT and fast upsampling, as the loader uses them. A broken JPEG ends the program, as libjpeg does by default.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

static struct jpeg_decompress_struct decoder;
static struct jpeg_error_mgr errors;

void start(void) {
  decoder.err = jpeg_std_error(&errors);
  jpeg_create_decompress(&decoder);
}

/* Decodes the box; returns the first column that out has (libjpeg begins at an iMCU) and sets its width. out: h rows of RGB. */
int decode_region(const uint8_t *data, size_t size, int x, int y, int w, int h, uint8_t *out, int *out_width) {
  JDIMENSION first = x, width = w;
  jpeg_mem_src(&decoder, data, size);
  jpeg_read_header(&decoder, TRUE);
  decoder.out_color_space = JCS_RGB;
  decoder.dct_method = JDCT_IFAST;
  decoder.do_fancy_upsampling = FALSE;
  jpeg_start_decompress(&decoder);
  if (width < decoder.output_width) jpeg_crop_scanline(&decoder, &first, &width);
  if (y) jpeg_skip_scanlines(&decoder, y);
  for (int row = 0; row < h;) {
    JSAMPROW line = out + (size_t)row * width * 3;
    row += jpeg_read_scanlines(&decoder, &line, 1);
  }
  jpeg_abort_decompress(&decoder);
  *out_width = width;
  return first;
}

static int big_endian(const uint8_t *at) { return at[0] << 8 | at[1]; }

/* Cuts the tiles under the box out of a JPEG whose restart interval divides its rows of MCUs: a smaller JPEG in `out`.
 * Returns its size; origin[0..1] is where its first pixel lies in the image. 4:2:0 and one scan are taken for granted.
 */
size_t splice(const uint8_t *data, size_t size, const int *box, uint8_t *out, int *origin) {
  size_t at = 2, frame = 0;
  int interval = 1;
  for (int marker = 0; marker != 0xDA; at += 2 + big_endian(data + at + 2)) {
    marker = data[at + 1];
    if (marker == 0xC0) frame = at;
    if (marker == 0xDD) interval = big_endian(data + at + 4);
    if (marker == 0xDA) { at += 2 + big_endian(data + at + 2); break; }
  }
  int height = big_endian(data + frame + 5), width = big_endian(data + frame + 7);
  int tile = 16 * interval, columns = (width + tile - 1) / tile;
  int left = box[0] / tile, right = (box[0] + box[2] + tile - 1) / tile;
  int top = box[1] / 16, bottom = (box[1] + box[3] + 15) / 16;
  int new_width = (right * tile < width ? right * tile : width) - left * tile;
  int new_height = (bottom * 16 < height ? bottom * 16 : height) - top * 16;
  memcpy(out, data, at);
  out[frame + 5] = new_height >> 8, out[frame + 6] = new_height & 255;
  out[frame + 7] = new_width >> 8, out[frame + 8] = new_width & 255;

  const uint8_t *end = data + size - 2, *segment = data + at;
  uint8_t *to = out + at;
  int number = 0, next = 0;
  for (const uint8_t *found = segment; number < bottom * columns; found += 2) {
    found = memchr(found, 0xFF, end - found);
    if (!found) found = end;
    if (found < end && (found[1] & 0xF8) != 0xD0) continue; /* a stuffed byte */
    int row = number / columns, column = number % columns;
    if (row >= top && column >= left && column < right) {
      if (next) *to++ = 0xFF, *to++ = 0xD0 + (next - 1) % 8;
      memcpy(to, segment, found - segment);
      to += found - segment, next++;
    }
    segment = found + 2, number++;
  }
  *to++ = 0xFF, *to++ = 0xD9;
  origin[0] = left * tile, origin[1] = top * 16;
  return to - out;
}
