/* Growing arrays, and characters of UTF-8. All text is valid UTF-8, and all lengths are bytes. */

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SEPARATOR "\n\xE2\xBF\xBB\n" /* U+2FFB between line breaks: what joins to nothing */

typedef struct {
  void *data;
  int64_t used, room; /* elements */
} Growing;

/* Room for `more` elements behind those used; a process out of memory ends. */
static void *grow(Growing *growing, int64_t more, size_t size) {
  if (growing->used + more > growing->room) {
    growing->room = 2 * (growing->used + more);
    growing->data = realloc(growing->data, growing->room * size);
    if (!growing->data) abort();
  }
  return (char *)growing->data + growing->used * size;
}

static inline void append(Growing *growing, const void *from, int64_t count, size_t size) {
  memcpy(grow(growing, count, size), from, count * size);
  growing->used += count;
}

/* Bytes of the white space character (Unicode's White_Space) at `at`, 0 where there is none. */
static inline int space_bytes(const uint8_t *at, const uint8_t *end) {
  const uint8_t first = *at;
  if (first == ' ' || (first >= '\t' && first <= '\r')) return 1;
  if (first < 0xC2 || first > 0xE3) return 0;
  if (first == 0xC2 && end - at >= 2) return at[1] == 0x85 || at[1] == 0xA0 ? 2 : 0;
  if (end - at < 3) return 0;
  const uint32_t three = first << 16 | at[1] << 8 | at[2];
  return (three >= 0xE28080 && three <= 0xE2808A) || three == 0xE280A8 || three == 0xE280A9 ||
                 three == 0xE280AF || three == 0xE2819F || three == 0xE19A80 || three == 0xE38080
             ? 3
             : 0;
}

static inline int char_bytes(uint8_t first) {
  return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

/* The code point at `at`. */
static inline uint32_t code_point(const uint8_t *at) {
  switch (char_bytes(*at)) {
    case 1: return *at;
    case 2: return (at[0] & 0x1F) << 6 | (at[1] & 0x3F);
    case 3: return (at[0] & 0x0F) << 12 | (at[1] & 0x3F) << 6 | (at[2] & 0x3F);
    default:
      return (at[0] & 0x07) << 18 | (at[1] & 0x3F) << 12 | (at[2] & 0x3F) << 6 | (at[3] & 0x3F);
  }
}
