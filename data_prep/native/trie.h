/* A double-array trie of a vocabulary's pieces. */

#pragma once

#include "text.h"

typedef struct {
  int32_t base, parent, id, free; /* child of byte b: base ^ b, if its parent is this one */
} Unit;

static int32_t new_block(Growing *units) {
  Unit *unit = grow(units, 256, sizeof *unit);
  for (int i = 0; i < 256; i++) unit[i] = (Unit){.parent = -1, .id = -1};
  units->used += 256;
  return units->used - 256;
}

static int fits(const Unit *units, int32_t base, const uint8_t *labels, int count) {
  for (int i = 0; i < count; i++)
    if (units[base ^ labels[i]].parent >= 0) return 0;
  return 1;
}

/* The search begins at *from, which moves on once what follows it is almost full. */
static int32_t find_base(Growing *units, int64_t *from, const uint8_t *labels, int count) {
  int64_t taken = 0;
  for (int64_t at = *from; at < units->used; at++) {
    const Unit *unit = units->data;
    if (unit[at].parent >= 0) {
      taken++;
    } else if (fits(unit, at ^ labels[0], labels, count)) {
      if (taken > (at - *from) * 15 / 16) *from = at;
      return at ^ labels[0];
    }
  }
  if (taken > (units->used - *from) * 15 / 16) *from = units->used;
  return new_block(units);
}

typedef struct {
  const uint8_t *bytes;
  const int64_t *ends;
  const int32_t *ids;
} Pieces;

static inline int64_t piece_start(const Pieces *pieces, int64_t piece) {
  return piece ? pieces->ends[piece - 1] : 0;
}

/* Put the pieces first..last - 1, which share their first `depth` bytes, below a unit. */
static void add_pieces(Growing *units, int64_t *from, const Pieces *pieces, int64_t first,
                       int64_t last, int32_t node, int64_t depth) {
  if (piece_start(pieces, first) + depth == pieces->ends[first])
    ((Unit *)units->data)[node].id = pieces->ids[first++];
  uint8_t labels[256];
  int64_t starts[257];
  int count = 0;
  for (int64_t piece = first; piece < last; piece++) {
    const uint8_t label = pieces->bytes[piece_start(pieces, piece) + depth];
    if (count && labels[count - 1] == label) continue;
    labels[count] = label;
    starts[count++] = piece;
  }
  if (!count) return;
  starts[count] = last;
  const int32_t base = find_base(units, from, labels, count);
  ((Unit *)units->data)[node].base = base;
  for (int i = 0; i < count; i++) ((Unit *)units->data)[base ^ labels[i]].parent = node;
  for (int i = 0; i < count; i++)
    add_pieces(units, from, pieces, starts[i], starts[i + 1], base ^ labels[i], depth + 1);
}

/* Pieces in the order of their bytes, each once, none empty. */
static Growing new_trie(Pieces pieces, int64_t num_pieces) {
  Growing units = {0};
  new_block(&units);
  ((Unit *)units.data)[0].parent = 0; /* the root is taken */
  int64_t from = 0;
  add_pieces(&units, &from, &pieces, 0, num_pieces, 0, 0);
  return units;
}

/* The unit that a byte leads to, 0 where no piece goes on. */
static inline int32_t step(const Unit *units, int32_t node, uint8_t byte) {
  const int32_t child = units[node].base ^ byte;
  return units[child].parent == node ? child : 0;
}
