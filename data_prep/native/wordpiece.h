/* WordPiece, as BERT's: the longest piece first. */

#pragma once

#include "trie.h"

typedef struct {
  Growing units;
  uint8_t *alone; /* of each code point: whether it is a word of its own, as punctuation is */
  int32_t unk_id, inner; /* inner is the trie's unit behind ## */
  int64_t max_chars;     /* of a word that is not unknown for its length */
} Wordpiece;

Wordpiece *wordpiece_new(const uint8_t *bytes, const int64_t *ends, const int32_t *ids,
                         int64_t num_pieces, const uint8_t *alone, int64_t num_chars,
                         const uint8_t *prefix, int32_t unk_id, int64_t max_chars) {
  Wordpiece *wordpiece = calloc(1, sizeof *wordpiece);
  if (!wordpiece || !(wordpiece->alone = malloc(num_chars))) abort();
  memcpy(wordpiece->alone, alone, num_chars);
  wordpiece->units = new_trie((Pieces){bytes, ends, ids}, num_pieces);
  wordpiece->unk_id = unk_id;
  wordpiece->max_chars = max_chars;
  for (wordpiece->inner = 0; *prefix; prefix++) {
    wordpiece->inner = step(wordpiece->units.data, wordpiece->inner, *prefix);
    if (!wordpiece->inner) { /* no piece begins so, and none is below this unit */
      wordpiece->inner = -1;
      break;
    }
  }
  return wordpiece;
}

void wordpiece_free(Wordpiece *wordpiece) {
  free(wordpiece->units.data);
  free(wordpiece->alone);
  free(wordpiece);
}

static void wordpiece_put_word(Wordpiece *wordpiece, const uint8_t *word, const uint8_t *end,
                               int64_t chars, Growing *out) {
  const Unit *units = wordpiece->units.data;
  const int64_t used = out->used;
  int32_t node = 0;
  for (const uint8_t *at = word; at < end;) {
    int32_t id = -1;
    const uint8_t *stop = at;
    if (chars <= wordpiece->max_chars && node >= 0)
      for (const uint8_t *next = at; next < end && (node = step(units, node, *next));) {
        next++;
        if (units[node].id >= 0) id = units[node].id, stop = next;
      }
    if (id < 0) { /* one part unknown, all unknown */
      out->used = used;
      append(out, &wordpiece->unk_id, 1, sizeof id);
      return;
    }
    append(out, &id, 1, sizeof id);
    at = stop;
    node = wordpiece->inner;
  }
}

/* Append the ids of normalised text: it is split at white space and around what stands alone. */
static void wordpiece_put(Wordpiece *wordpiece, const uint8_t *text, const uint8_t *end,
                          Growing *out) {
  while (text < end) {
    const int space = space_bytes(text, end);
    const uint8_t *stop = text;
    int64_t chars = 0;
    if (!space && wordpiece->alone[code_point(text)]) {
      stop += char_bytes(*text);
      chars = 1;
    } else if (!space) {
      for (; stop < end && !space_bytes(stop, end) && !wordpiece->alone[code_point(stop)]; chars++)
        stop += char_bytes(*stop);
    }
    if (space) stop += space;
    else wordpiece_put_word(wordpiece, text, stop, chars, out);
    text = stop;
  }
}
