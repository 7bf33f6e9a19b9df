/* Byte-level BPE, as RoBERTa's: the pair that was merged first in training, the leftmost first. */

#pragma once

#include "text.h"

enum { OTHER, LETTER, NUMBER, WHITE }; /* kinds of characters, of which words are runs */

typedef struct {
  uint64_t pair; /* left id << 32 | right id; all ones is a free slot */
  int32_t rank, id;
} Merge;

typedef struct {
  int32_t id, before, next; /* neighbours, -1 at the ends; id is -1 once merged into the left */
} Symbol;

typedef struct {
  int32_t rank, at, id;
} Candidate;

typedef struct {
  Merge *merges;
  uint64_t mask; /* slots of merges, less one */
  uint8_t *kinds; /* of code points */
  int32_t byte_ids[256];
  Growing symbols, heap; /* Symbol, Candidate: of one word */
} Bpe;

static inline const Merge *find_merge(const Bpe *bpe, int32_t left, int32_t right) {
  const uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
  uint64_t at = (pair * 0x9E3779B97F4A7C15u) >> 32 & bpe->mask;
  while (bpe->merges[at].pair != pair && bpe->merges[at].pair != UINT64_MAX)
    at = (at + 1) & bpe->mask;
  return bpe->merges + at;
}

/* Merge r makes made[r] of lefts[r] and rights[r]; of a pair given twice the last counts. */
Bpe *bpe_new(const int32_t *lefts, const int32_t *rights, const int32_t *made, int64_t num_merges,
             const int32_t *byte_ids, const uint8_t *kinds, int64_t num_chars) {
  Bpe *bpe = calloc(1, sizeof *bpe);
  if (!bpe) abort();
  for (bpe->mask = 1; bpe->mask < 2 * (uint64_t)num_merges; bpe->mask *= 2);
  bpe->merges = malloc(bpe->mask * sizeof(Merge));
  bpe->kinds = malloc(num_chars);
  if (!bpe->merges || !bpe->kinds) abort();
  for (uint64_t i = 0; i < bpe->mask; i++) bpe->merges[i].pair = UINT64_MAX;
  bpe->mask--;
  for (int64_t i = 0; i < num_merges; i++)
    *(Merge *)find_merge(bpe, lefts[i], rights[i]) =
        (Merge){(uint64_t)lefts[i] << 32 | (uint32_t)rights[i], i, made[i]};
  memcpy(bpe->kinds, kinds, num_chars);
  memcpy(bpe->byte_ids, byte_ids, sizeof bpe->byte_ids);
  return bpe;
}

void bpe_free(Bpe *bpe) {
  free(bpe->merges);
  free(bpe->kinds);
  free(bpe->symbols.data);
  free(bpe->heap.data);
  free(bpe);
}

static inline int sooner(Candidate a, Candidate b) {
  return a.rank < b.rank || (a.rank == b.rank && a.at < b.at);
}

static void push(Growing *heap, Candidate candidate) {
  append(heap, &candidate, 1, sizeof candidate);
  Candidate *all = heap->data;
  int64_t at = heap->used - 1;
  for (; at > 0 && sooner(candidate, all[(at - 1) / 2]); at = (at - 1) / 2)
    all[at] = all[(at - 1) / 2];
  all[at] = candidate;
}

static Candidate pop(Growing *heap) {
  Candidate *all = heap->data;
  const Candidate top = all[0], last = all[--heap->used];
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < heap->used; at = child) {
    if (child + 1 < heap->used && sooner(all[child + 1], all[child])) child++;
    if (!sooner(all[child], last)) break;
    all[at] = all[child];
  }
  all[at] = last;
  return top;
}

/* Take up that a symbol may merge with the next. */
static inline void consider(Bpe *bpe, const Symbol *symbols, int32_t at) {
  if (at < 0 || symbols[at].next < 0) return;
  const Merge *merge = find_merge(bpe, symbols[at].id, symbols[symbols[at].next].id);
  if (merge->pair != UINT64_MAX) push(&bpe->heap, (Candidate){merge->rank, at, merge->id});
}

static void bpe_put_word(Bpe *bpe, const uint8_t *word, int64_t bytes, Growing *out) {
  bpe->symbols.used = bpe->heap.used = 0;
  Symbol *symbols = grow(&bpe->symbols, bytes, sizeof *symbols);
  for (int64_t i = 0; i < bytes; i++)
    symbols[i] = (Symbol){bpe->byte_ids[word[i]], i - 1, i + 1 < bytes ? i + 1 : -1};
  for (int64_t i = 0; i + 1 < bytes; i++) consider(bpe, symbols, i);
  while (bpe->heap.used) {
    const Candidate top = pop(&bpe->heap);
    Symbol *left = symbols + top.at;
    if (left->id < 0 || left->next < 0) continue;
    Symbol *right = symbols + left->next;
    const Merge *merge = find_merge(bpe, left->id, right->id);
    if (merge->pair == UINT64_MAX || merge->id != top.id) continue; /* one of them has changed */
    left->id = top.id;
    left->next = right->next;
    right->id = -1;
    if (left->next >= 0) symbols[left->next].before = top.at;
    consider(bpe, symbols, left->before);
    consider(bpe, symbols, top.at);
  }
  for (int32_t at = 0; at >= 0 && bytes; at = symbols[at].next)
    append(out, &symbols[at].id, 1, sizeof symbols->id);
}

static inline int kind_at(const Bpe *bpe, const uint8_t *at) { return bpe->kinds[code_point(at)]; }

/* Bytes of the English ending ('s, 't, 're, 've, 'm, 'll, 'd) at `at`, 0 where there is none. */
static inline int ending_bytes(const uint8_t *at, const uint8_t *end) {
  if (*at != '\'' || end - at < 2) return 0;
  if (at[1] == 's' || at[1] == 't' || at[1] == 'm' || at[1] == 'd') return 2;
  if (end - at < 3) return 0;
  return (at[2] == 'e' && (at[1] == 'r' || at[1] == 'v')) || (at[1] == 'l' && at[2] == 'l') ? 3 : 0;
}

/* Where the word that begins at `at` ends. */
static const uint8_t *word_end(const Bpe *bpe, const uint8_t *at, const uint8_t *end) {
  const int ending = ending_bytes(at, end);
  if (ending) return at + ending;
  const uint8_t *stop = at + (*at == ' ' && at + 1 < end);
  const int kind = kind_at(bpe, stop);
  const uint8_t *last = stop;
  while (stop < end && kind_at(bpe, stop) == kind) {
    last = stop;
    stop += char_bytes(*stop);
  }
  /* The last white space before anything else is not of its run. */
  return kind == WHITE && stop < end && last > at ? last : stop;
}

/* Append the ids of normalised text. */
static void bpe_put(Bpe *bpe, const uint8_t *text, const uint8_t *end, Growing *out) {
  while (text < end) {
    const uint8_t *stop = word_end(bpe, text, end);
    bpe_put_word(bpe, text, stop - text, out);
    text = stop;
  }
}
