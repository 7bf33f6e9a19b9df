/* Unigram, as XLM-R's: the path of the largest sum of scores. */

#pragma once

#include "trie.h"

#define SPACE "\xE2\x96\x81" /* U+2581 */

typedef struct {
  double score;
  int32_t from, id; /* bytes back; 0 is not reached yet */
} Best;

typedef struct {
  Growing units;
  double *scores; /* of ids */
  int32_t unk_id;
  double unk_score;
  Growing best, spelled, path; /* Best, uint8, int32: of one word */
} Unigram;

Unigram *unigram_new(const uint8_t *bytes, const int64_t *ends, const int32_t *ids,
                     int64_t num_pieces, const double *scores, int64_t num_ids, int32_t unk_id,
                     double unk_score) {
  Unigram *unigram = calloc(1, sizeof *unigram);
  if (!unigram || !(unigram->scores = malloc(num_ids * sizeof *scores))) abort();
  memcpy(unigram->scores, scores, num_ids * sizeof *scores);
  unigram->units = new_trie((Pieces){bytes, ends, ids}, num_pieces);
  unigram->unk_id = unk_id;
  unigram->unk_score = unk_score;
  return unigram;
}

void unigram_free(Unigram *unigram) {
  free(unigram->units.data);
  free(unigram->scores);
  free(unigram->best.data);
  free(unigram->spelled.data);
  free(unigram->path.data);
  free(unigram);
}

/* The places of a word from `origin` on, of which those up to `end` now exist. */
static inline Best *reach_to(Unigram *unigram, int64_t end, int64_t origin, int64_t *reach) {
  if (end <= *reach) return unigram->best.data;
  Best *best = grow(&unigram->best, end - origin + 1, sizeof *best);
  while (*reach < end) best[++*reach - origin].from = 0;
  return best;
}

static inline void offer(Best *best, double score, int32_t from, int32_t id) {
  if (best->from && score <= best->score) return;
  *best = (Best){score, from, id};
}

/* Append the ids of the best path that ends at `end`, where one of unknown characters is one. */
static int put_path(Unigram *unigram, const Best *best, int64_t end, int after_unk, Growing *out) {
  unigram->path.used = 0;
  for (int64_t at = end; at > 0; at -= best[at].from)
    append(&unigram->path, &best[at].id, 1, sizeof best->id);
  const int32_t *path = unigram->path.data;
  uint32_t *ids = grow(out, unigram->path.used, sizeof *ids);
  for (int64_t i = unigram->path.used; i-- > 0;) {
    const int is_unk = path[i] == unigram->unk_id;
    if (!(is_unk && after_unk)) *ids++ = path[i], out->used++;
    after_unk = is_unk;
  }
  return after_unk;
}

/* Append the ids of a word by the path of the largest sum of scores; of equal ones, the one found
   first. Scores are added from the word's beginning on, in double precision, since another order
   rounds otherwise. Wherever no piece goes on, what lies behind is decided and put out. */
static void unigram_put_word(Unigram *unigram, const uint8_t *word, int64_t bytes, Growing *out) {
  const Unit *units = unigram->units.data;
  unigram->best.used = 0;
  Best *best = grow(&unigram->best, 1, sizeof *best);
  best[0].score = 0;
  int64_t origin = 0, reach = 0;
  int after_unk = 0;
  for (int64_t start = 0; start < bytes;) {
    const double score = best[start - origin].score;
    if (start == reach) {
      after_unk = put_path(unigram, best, start - origin, after_unk, out);
      origin = start;
    }
    const int64_t next = start + char_bytes(word[start]);
    int has_char = 0;
    int32_t node = 0;
    for (int64_t end = start; end < bytes;) {
      if (!(node = step(units, node, word[end++]))) break;
      if (units[node].id < 0) continue;
      best = reach_to(unigram, end, origin, &reach);
      offer(best + (end - origin), score + unigram->scores[units[node].id], end - start,
            units[node].id);
      has_char |= end == next;
    }
    if (!has_char) {
      best = reach_to(unigram, next, origin, &reach);
      offer(best + (next - origin), score + unigram->unk_score, next - start, unigram->unk_id);
    }
    start = next;
  }
  put_path(unigram, best, bytes - origin, after_unk, out);
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
