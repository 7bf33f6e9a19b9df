/* The ids of text, word by word, where those of words met before are looked up. See word_ids.py.

   A word is white space and what follows it up to the next: "a b\n c" is "a", " b", "\n c". Only
   spaces, tabs and line breaks begin one, as normalising may take away other white space, and only
   where no white space is before, as a run of it is one thing. */

#include "bpe.h"
#include "unigram.h"
#include "wordpiece.h"

#define SLOTS (1u << 21)       /* of the table; half of them are filled at most */
#define KEPT_BYTES 64          /* longer words hardly come again */
#define ROUND_WORDS (1 << 17)  /* of a round, after which new words are learnt */
#define ROUND_NEW (1 << 20)    /* bytes of new words of a round */
#define TEXT_ENDS UINT32_MAX   /* among found words */
#define PASSING (1u << 31)     /* a word that is forgotten after the round */

typedef struct {
  uint32_t hash, word; /* word is one more than its index: 0 is a free slot */
} Slot;

typedef struct {
  uint32_t key, bytes; /* in keys */
  uint32_t ids, count; /* in ids */
} Word;

typedef struct {
  const uint8_t *at; /* in the text of the call */
  int64_t bytes;
  uint32_t word;
} Plain;

typedef struct {
  Slot *slots;
  const uint8_t *plain_chars;                  /* of code points: 1 where normalising does nothing */
  Growing keys, words, ids;                    /* uint8, Word, uint32 */
  Growing passing_words, passing_ids;          /* Word, uint32: of one round */
  Growing found, plain, missing, missing_text; /* uint32, Plain, uint32, uint8: of one round */
  int64_t new_bytes;                           /* of one round */
  Growing out;                                 /* uint32: ids of all texts of a call */
  int64_t text, at;                            /* where the next round begins */
} Words;

/* `plain_chars` must outlive the words. */
Words *words_new(const uint8_t *plain_chars) {
  Words *words = calloc(1, sizeof(Words));
  if (!words || !(words->slots = calloc(SLOTS, sizeof(Slot)))) abort();
  words->plain_chars = plain_chars;
  return words;
}

void words_free(Words *words) {
  Growing *all[] = {&words->keys, &words->words, &words->ids, &words->passing_words,
                    &words->passing_ids, &words->found, &words->plain, &words->missing,
                    &words->missing_text, &words->out};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]->data);
  free(words->slots);
  free(words);
}

static inline uint32_t hash_of(const uint8_t *key, int64_t bytes) {
  uint64_t hash = bytes * 0x9E3779B97F4A7C15u, part;
  for (; bytes >= 8; key += 8, bytes -= 8) {
    memcpy(&part, key, 8);
    hash = (hash ^ part) * 0xD6E8FEB86659FD93u;
    hash ^= hash >> 32;
  }
  part = 0;
  for (int64_t i = 0; i < bytes; i++) part = part << 8 | key[i];
  hash = (hash ^ part) * 0xD6E8FEB86659FD93u;
  return hash ^ hash >> 32;
}

static int is_plain(const Words *words, const uint8_t *key, int64_t bytes) {
  const uint8_t *const end = key + bytes;
  while (key < end && words->plain_chars[code_point(key)]) key += char_bytes(*key);
  return key == end;
}

static uint32_t add_new(Words *words, const uint8_t *key, int64_t bytes, uint32_t index) {
  words->new_bytes += bytes;
  if (is_plain(words, key, bytes)) {
    const Plain plain = {key, bytes, index};
    append(&words->plain, &plain, 1, sizeof plain);
    return index;
  }
  append(&words->missing, &index, 1, sizeof index);
  append(&words->missing_text, key, bytes, 1);
  append(&words->missing_text, SEPARATOR, strlen(SEPARATOR), 1);
  return index;
}

static inline uint32_t find(Words *words, const uint8_t *key, int64_t bytes) {
  if (bytes > KEPT_BYTES) {
    const Word word = {0};
    append(&words->passing_words, &word, 1, sizeof word);
    return add_new(words, key, bytes, PASSING | (words->passing_words.used - 1));
  }
  const uint32_t hash = hash_of(key, bytes);
  uint32_t at = hash & (SLOTS - 1);
  for (; words->slots[at].word; at = (at + 1) & (SLOTS - 1)) {
    if (words->slots[at].hash != hash) continue;
    const uint32_t index = words->slots[at].word - 1;
    const Word *word = (Word *)words->words.data + index;
    if (word->bytes == bytes && !memcmp((uint8_t *)words->keys.data + word->key, key, bytes))
      return index;
  }
  const Word word = {.key = words->keys.used, .bytes = bytes};
  append(&words->keys, key, bytes, 1);
  append(&words->words, &word, 1, sizeof word);
  words->slots[at] = (Slot){hash, words->words.used};
  return add_new(words, key, bytes, words->words.used - 1);
}

void words_begin(Words *words) { words->text = words->at = words->out.used = 0; }

/* Find the words of a round. Text t is text[ends[t - 1] : ends[t]]; `missing` becomes what is to be
   normalised before it is learnt next, each word with a separator behind. Returns whether a round
   has anything to do. */
int words_find(Words *words, const uint8_t *text, const int64_t *ends, int64_t num_texts,
               const uint8_t **missing, int64_t *missing_bytes) {
  if (words->words.used + ROUND_WORDS > SLOTS / 2) { /* forget all, as what comes may be new */
    memset(words->slots, 0, SLOTS * sizeof(Slot));
    words->words.used = words->keys.used = words->ids.used = 0;
  }
  words->passing_words.used = words->passing_ids.used = 0;
  words->found.used = words->plain.used = words->missing.used = words->missing_text.used = 0;
  words->new_bytes = 0;
  while (words->text < num_texts && words->found.used < ROUND_WORDS &&
         words->new_bytes < ROUND_NEW) {
    const uint8_t *const start = text + words->at, *const end = text + ends[words->text];
    const uint8_t *at = start;
    uint32_t index = TEXT_ENDS;
    if (start == end) {
      words->text++;
    } else {
      for (int space = 1; at < end; at += char_bytes(*at)) {
        const int before = space;
        space = space_bytes(at, end);
        if (space && !before && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) break;
      }
      index = find(words, start, at - start);
      words->at += at - start;
    }
    append(&words->found, &index, 1, sizeof index);
  }
  *missing = words->missing_text.data;
  *missing_bytes = words->missing_text.used;
  return words->found.used > 0;
}

static inline Word *word_at(Words *words, uint32_t index) {
  return index & PASSING ? (Word *)words->passing_words.data + (index & ~PASSING)
                         : (Word *)words->words.data + index;
}

static inline Growing *ids_of(Words *words, uint32_t index) {
  return index & PASSING ? &words->passing_ids : &words->ids;
}

/* Append the ids of the found words to those put out; lengths[t] grows by how many text t has. */
const uint32_t *words_put(Words *words, int64_t *lengths, int64_t *used) {
  const uint32_t *found = words->found.data;
  int64_t text = words->text;
  for (int64_t i = 0; i < words->found.used; i++) text -= found[i] == TEXT_ENDS;
  for (int64_t i = 0; i < words->found.used; i++) {
    if (found[i] == TEXT_ENDS) {
      text++;
      continue;
    }
    const Word *word = word_at(words, found[i]);
    const uint32_t *ids = (uint32_t *)ids_of(words, found[i])->data + word->ids;
    uint32_t *out = grow(&words->out, word->count, sizeof *ids);
    for (uint32_t k = 0; k < word->count; k++) out[k] = ids[k];
    words->out.used += word->count;
    lengths[text] += word->count;
  }
  *used = words->out.used;
  return words->out.data;
}

/* Learn the new words by a model: the plain ones, which lie in the text of the call, and the missing
   ones from their text, normalised, with the separators. Normalising may change line breaks, but
   only where white space does not count: `breaks` is 1 where it does. */
#define LEARN(name, Model, put, breaks)                                                            \
  static void name##_word(Words *words, Model *model, uint32_t index, const uint8_t *text,         \
                          const uint8_t *stop) {                                                   \
    Growing *ids = ids_of(words, index);                                                           \
    Word *word = word_at(words, index);                                                            \
    word->ids = ids->used;                                                                         \
    put(model, text, stop, ids);                                                                   \
    word->count = ids->used - word->ids;                                                           \
  }                                                                                                \
  void name(Words *words, Model *model, const uint8_t *text, int64_t bytes) {                      \
    const uint8_t *const mark = (uint8_t *)SEPARATOR + 1, *const end = text + bytes;               \
    for (int64_t i = 0; i < words->plain.used; i++) {                                              \
      const Plain plain = ((Plain *)words->plain.data)[i];                                         \
      name##_word(words, model, plain.word, plain.at, plain.at + plain.bytes);                     \
    }                                                                                              \
    for (int64_t i = 0; i < words->missing.used; i++) {                                            \
      const uint8_t *stop = text;                                                                  \
      while (stop + 3 < end && memcmp(stop, mark, 3)) stop++;                                      \
      name##_word(words, model, ((uint32_t *)words->missing.data)[i], text, stop - breaks);        \
      text = stop + 3 + breaks;                                                                    \
    }                                                                                              \
  }
LEARN(unigram_learn, Unigram, unigram_put, 0)
LEARN(wordpiece_learn, Wordpiece, wordpiece_put, 0)
LEARN(bpe_learn, Bpe, bpe_put, 1)
