/* Unigram, as XLM-R's: the path of the largest sum of scores. */

#pragma once

#include "trie.h"

#define SPACE "\xE2\x96\x81" /* U+2581 */

typedef struct {
  Growing units;
  double *scores; /* of ids */
  int32_t unk_id;
  double unk_score;
  double *best; /* of the places of a word up to the longest piece ahead, in turn */
  int64_t mask; /* places that `best` holds, less one */
  Growing back, spelled; /* uint16: bytes back to the place before, 0 is not reached yet; uint8 */
} Unigram;

Unigram *unigram_new(const uint8_t *bytes, const int64_t *ends, const int32_t *ids,
                     int64_t num_pieces, const double *scores, int64_t num_ids, int32_t unk_id,
                     double unk_score) {
  Unigram *unigram = calloc(1, sizeof *unigram);
  if (!unigram || !(unigram->scores = malloc(num_ids * sizeof *scores))) abort();
  memcpy(unigram->scores, scores, num_ids * sizeof *scores);
  const Pieces pieces = {bytes, ends, ids};
  unigram->units = new_trie(pieces, num_pieces);
  unigram->unk_id = unk_id;
  unigram->unk_score = unk_score;
  int64_t places = 8; /* more than the bytes of a piece or character */
  for (int64_t i = 0; i < num_pieces; i++)
    while (places <= ends[i] - piece_start(&pieces, i)) places *= 2;
  if (!(unigram->best = malloc(places * sizeof *unigram->best))) abort();
  unigram->mask = places - 1;
  return unigram;
}

void unigram_free(Unigram *unigram) {
  free(unigram->units.data);
  free(unigram->scores);
  free(unigram->best);
  free(unigram->back.data);
  free(unigram->spelled.data);
  free(unigram);
}

/* The places of a word from `origin` on, of which those up to `end` now exist. */
static inline uint16_t *reach_to(Unigram *unigram, int64_t end, int64_t origin, int64_t *reach) {
  if (end <= *reach) return unigram->back.data;
  uint16_t *back = grow(&unigram->back, end - origin + 1, sizeof *back);
  while (*reach < end) back[++*reach - origin] = 0;
  return back;
}

static inline void offer(Unigram *unigram, uint16_t *back, int64_t end, double score,
                         int64_t from) {
  double *best = unigram->best + (end & unigram->mask);
  if (*back && score <= *best) return;
  *best = score;
  *back = from;
}

/* The id of a piece, or that of unknown characters where there is none. */
static inline int32_t id_of(const Unigram *unigram, const uint8_t *piece, int64_t bytes) {
  const Unit *units = unigram->units.data;
  int32_t node = 0;
  for (int64_t i = 0; i < bytes; i++)
    if (!(node = step(units, node, piece[i]))) return unigram->unk_id;
  return units[node].id < 0 ? unigram->unk_id : units[node].id;
}

/* Append the ids of the best path over `text` to its place `end`, one for unknown ones in a row. */
static int put_path(Unigram *unigram, const uint8_t *text, int64_t end, int after_unk,
                    Growing *out) {
  const uint16_t *back = unigram->back.data;
  int64_t count = 0;
  for (int64_t at = end; at > 0; at -= back[at]) count++;
  int32_t *ids = grow(out, count, sizeof *ids), *kept = ids;
  int64_t i = count;
  for (int64_t at = end; at > 0; at -= back[at])
    ids[--i] = id_of(unigram, text + at - back[at], back[at]);
  for (; i < count; i++) {
    const int is_unk = ids[i] == unigram->unk_id;
    if (!(is_unk && after_unk)) *kept++ = ids[i];
    after_unk = is_unk;
  }
  out->used += kept - ids;
  return after_unk;
}

/* Append the ids of a word by the path of the largest sum of scores; of equal ones, the one found
   first. Scores are added from the word's beginning on, in double precision, since another order
   rounds otherwise. Wherever no piece goes on, what lies behind is decided and put out. A place
   costs two bytes, as a word can be millions of characters: its score is forgotten when it is
   behind, and its piece is looked up again. */
static void unigram_put_word(Unigram *unigram, const uint8_t *word, int64_t bytes, Growing *out) {
  const Unit *units = unigram->units.data;
  unigram->back.used = 0;
  uint16_t *back = grow(&unigram->back, 1, sizeof *back);
  unigram->best[0] = 0;
  int64_t origin = 0, reach = 0;
  int after_unk = 0;
  for (int64_t start = 0; start < bytes;) {
    const double score = unigram->best[start & unigram->mask];
    if (start == reach) {
      after_unk = put_path(unigram, word + origin, start - origin, after_unk, out);
      origin = start;
    }
    const int64_t next = start + char_bytes(word[start]);
    int has_char = 0;
    int32_t node = 0;
    for (int64_t end = start; end < bytes;) {
      if (!(node = step(units, node, word[end++]))) break;
      if (units[node].id < 0) continue;
      back = reach_to(unigram, end, origin, &reach);
      offer(unigram, back + (end - origin), end, score + unigram->scores[units[node].id],
            end - start);
      has_char |= end == next;
    }
    if (!has_char) {
      back = reach_to(unigram, next, origin, &reach);
      offer(unigram, back + (next - origin), next, score + unigram->unk_score, next - start);
    }
    start = next;
  }
  put_path(unigram, word + origin, bytes - origin, after_unk, out);
}

/* Append the ids of normalised text: it is split at white space, every word begins with U+2581,
   and each further one begins a word of its own. */
static void unigram_put(Unigram *unigram, const uint8_t *text, const uint8_t *end, Growing *out) {
  const int64_t mark = strlen(SPACE);
  while (text < end) {
    const int space = space_bytes(text, end);
    if (space) {
      text += space;
      continue;
    }
    Growing *spelled = &unigram->spelled;
    spelled->used = 0;
    if (end - text < mark || memcmp(text, SPACE, mark)) append(spelled, SPACE, mark, 1);
    do {
      const int bytes = char_bytes(*text);
      append(spelled, text, bytes, 1);
      text += bytes;
    } while (text < end && !space_bytes(text, end) &&
             (end - text < mark || memcmp(text, SPACE, mark)));
    unigram_put_word(unigram, spelled->data, spelled->used, out);
  }
}
