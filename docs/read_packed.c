/* Read a packed file of tq_lightning (docs/format.md) in C99: one file without dependencies.
 *
 *     cc -std=c99 -O2 -o read_packed read_packed.c
 *     ./read_packed FILE BITS         list the tensors: name, codes, smallest, largest, dot product;
 *                                     and the level of each code, if the file has a table of them
 *     ./read_packed FILE BITS NAME    write the codes of a tensor to standard output, a byte each
 *
 * To use it as a library, define READ_PACKED_NO_MAIN, provide the file in memory (fread, mmap, or a
 * flash address), and call packed_open, packed_codes, packed_levels and packed_dot. Names are the
 * JSON strings of the header, with escapes. A compressed file is an error; write an uncompressed one
 * with `export FILE --out FILE2`.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HEADER ((uint64_t)64 << 20) /* bytes */
#define MAX_EXTENT ((uint64_t)1 << 48)  /* of a dimension, an offset, or a count */
#define MAX_DIMS 16
#define MAX_DEPTH 32 /* of nested JSON */
#define ALIGN 64     /* codes; every tensor starts at a multiple */

/* ---- SHA-256 (FIPS 180-4) -------------------------------------------------------------------- */

typedef struct {
    uint32_t state[8];
    uint8_t block[64];
    uint64_t length; /* bytes so far */
} sha256;

static uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static void sha256_block(sha256 *s, const uint8_t *block) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
               (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ (a >> 3)) + w[i - 7] +
               (rotate(b, 17) ^ rotate(b, 19) ^ (b >> 10));
    }
    memcpy(v, s->state, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[0], e = v[4];
        uint32_t t1 = v[7] + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +
                      ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) +
                      ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) s->state[i] += v[i];
}

static void sha256_start(sha256 *s) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(s->state, start, sizeof start);
    s->length = 0;
}

static void sha256_add(sha256 *s, const void *data, size_t size) {
    const uint8_t *from = data;
    while (size > 0) {
        size_t used = s->length % 64, n = 64 - used < size ? 64 - used : size;
        if (n == 64) {
            sha256_block(s, from);
        } else {
            memcpy(s->block + used, from, n);
            if (used + n == 64) sha256_block(s, s->block);
        }
        from += n;
        size -= n;
        s->length += n;
    }
}

static void sha256_hex(sha256 *s, char hex[64]) {
    static const uint8_t padding[64] = {0x80};
    uint8_t bits[8];
    for (int i = 0; i < 8; i++) bits[i] = (uint8_t)(s->length * 8 >> (56 - 8 * i));
    sha256_add(s, padding, 1 + (119 - s->length % 64) % 64);
    sha256_add(s, bits, 8);
    for (int i = 0; i < 64; i++) hex[i] = "0123456789abcdef"[s->state[i / 8] >> (28 - i % 8 * 4) & 15];
}

/* ---- JSON ------------------------------------------------------------------------------------ */

typedef struct {
    const char *at;
    size_t size;
} text;

typedef struct {
    const char *at, *end;
} json;

static int equals(text t, const char *word) {
    return t.size == strlen(word) && memcmp(t.at, word, t.size) == 0;
}

/* The next character that is not white space, or 0. */
static char json_peek(json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r'))
        j->at++;
    return j->at < j->end ? *j->at : 0;
}

static int json_take(json *j, char c) {
    if (json_peek(j) != c || c == 0) return 0;
    j->at++;
    return 1;
}

/* A string, without its quotes and with its escapes. */
static int json_string(json *j, text *out) {
    if (!json_take(j, '"')) return 0;
    out->at = j->at;
    while (j->at < j->end && *j->at != '"') {
        if (*j->at == '\\') j->at++;
        if (j->at < j->end) j->at++;
    }
    if (j->at >= j->end) return 0;
    out->size = (size_t)(j->at - out->at);
    j->at++;
    return 1;
}

/* An integer below MAX_EXTENT. */
static int json_integer(json *j, uint64_t *out) {
    uint64_t value = 0;
    json_peek(j);
    const char *start = j->at;
    while (j->at < j->end && *j->at >= '0' && *j->at <= '9') {
        value = value * 10 + (uint64_t)(*j->at++ - '0');
        if (value >= MAX_EXTENT) return 0;
    }
    *out = value;
    return j->at > start && !(j->at < j->end && (*j->at == '.' || *j->at == 'e' || *j->at == 'E'));
}

/* The next member of an array or object that was opened with json_take. 1, or 0 at the end, or -1. */
static int json_next(json *j, int *count, char close, text *key) {
    if (json_take(j, close)) return 0;
    if ((*count)++ > 0 && !json_take(j, ',')) return -1;
    if (key != NULL && (!json_string(j, key) || !json_take(j, ':'))) return -1;
    return 1;
}

static int json_skip(json *j, int depth) {
    text t;
    int count = 0, more;
    char c = json_peek(j);
    if (depth > MAX_DEPTH) return 0;
    if (c == '"') return json_string(j, &t);
    if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        j->at++;
        while ((more = json_next(j, &count, close, c == '{' ? &t : NULL)) > 0)
            if (!json_skip(j, depth + 1)) return 0;
        return more == 0;
    }
    const char *start = j->at;
    while (j->at < j->end && strchr("+-.0123456789abcdefghijklmnopqrstuvwxyzE", *j->at) && *j->at)
        j->at++;
    return j->at > start;
}

/* A list of at most MAX_DIMS dimensions, and their product. */
static int json_shape(json *j, uint64_t *product) {
    int count = 0, more;
    uint64_t n;
    *product = 1;
    if (!json_take(j, '[')) return 0;
    while ((more = json_next(j, &count, ']', NULL)) > 0) {
        if (count > MAX_DIMS || !json_integer(j, &n)) return 0;
        if (n > 0 && *product > MAX_EXTENT / n) return 0;
        *product *= n;
    }
    return more == 0;
}

/* Decode the escapes of a string of ASCII characters into new memory; NULL if that fails. */
static char *json_decode(text t, size_t *size) {
    static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
    char *out = malloc(t.size + 1), *to = out;
    for (size_t i = 0; out != NULL && i < t.size; i++) {
        unsigned code = (unsigned char)t.at[i];
        if (code == '\\' && ++i < t.size) {
            const char *found = t.at[i] == 0 ? NULL : strchr(from, t.at[i]);
            if (found != NULL) {
                code = (unsigned char)into[found - from];
            } else if (t.at[i] == 'u' && t.size - i > 4) {
                char hex[5] = {0}, *end;
                memcpy(hex, t.at + i + 1, 4);
                code = (unsigned)strtoul(hex, &end, 16);
                code = end == hex + 4 ? code : 128;
                i += 4;
            } else {
                code = 128;
            }
        }
        if (code > 127) {
            free(out);
            return NULL;
        }
        *to++ = (char)code;
    }
    if (out != NULL) *size = (size_t)(to - out);
    return out;
}

/* ---- The packed file ------------------------------------------------------------------------- */

typedef struct {
    text name, dtype;
    uint64_t begin, end; /* bytes, from the start of the data */
} packed_entry;

typedef struct {
    text name;
    uint64_t offset, size; /* codes */
} packed_tensor;

typedef struct {
    const char *error; /* why the last call failed */
    int stored_bits;
    uint64_t codes; /* of all tensors, with gaps */
    packed_tensor *tensors;
    size_t tensor_count;
    /* private */
    const uint8_t *body; /* the data behind the header */
    packed_entry *entries;
    size_t entry_count;
    char *header; /* decoded JSON, which names point into */
    text checksums;
} packed;

static int packed_fail(packed *p, const char *why) {
    p->error = why;
    return 0;
}

/* Make room for one more item of an array, which grows in powers of two. */
static void *packed_grow(void *items, size_t count, size_t item) {
    if (count > 0 && (count & (count - 1)) != 0) return items;
    return realloc(items, (count > 0 ? 2 * count : 1) * item);
}

static int by_begin(const void *a, const void *b) {
    const packed_entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int by_offset(const void *a, const void *b) {
    const packed_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->size < y->size ? -1 : x->size > y->size;
}

static int packed_parse_entry(packed *p, json *j, text name) {
    packed_entry e = {name, {NULL, 0}, 0, 0};
    uint64_t product = 0, item;
    int count = 0, more, seen = 0;
    text key;
    if (!json_take(j, '{')) return 0;
    while ((more = json_next(j, &count, '}', &key)) > 0) {
        if (equals(key, "dtype")) {
            if (!json_string(j, &e.dtype)) return 0;
            seen |= 1;
        } else if (equals(key, "shape")) {
            if (!json_shape(j, &product)) return 0;
            seen |= 2;
        } else if (equals(key, "data_offsets")) {
            if (!json_take(j, '[') || !json_integer(j, &e.begin) || !json_take(j, ',') ||
                !json_integer(j, &e.end) || !json_take(j, ']'))
                return 0;
            seen |= 4;
        } else {
            return 0;
        }
    }
    if (more < 0 || count != 3 || seen != 7) return 0;
    item = equals(e.dtype, "I64") || equals(e.dtype, "F64") ? 8 : equals(e.dtype, "F32") ? 4 : 1;
    if (item == 1 && !equals(e.dtype, "U8")) return 0;
    if (e.end < e.begin || e.end - e.begin != product * item) return 0;
    packed_entry *grown = packed_grow(p->entries, p->entry_count, sizeof e);
    if (grown == NULL) return 0;
    p->entries = grown;
    p->entries[p->entry_count++] = e;
    return 1;
}

static int packed_parse_tensor(packed *p, json *j) {
    packed_tensor t = {{NULL, 0}, 0, 0};
    uint64_t scales;
    int count = 0, more, seen = 0;
    text key;
    if (!json_take(j, '{')) return 0;
    while ((more = json_next(j, &count, '}', &key)) > 0) {
        int bit = equals(key, "name") | equals(key, "shape") << 1 | equals(key, "offset") << 2 |
                  equals(key, "scale") << 3;
        seen |= bit;
        if (!(bit == 1   ? json_string(j, &t.name)
              : bit == 2 ? json_shape(j, &t.size)
              : bit == 4 ? json_integer(j, &t.offset)
              : bit == 8 ? json_shape(j, &scales)
                         : 0))
            return 0;
    }
    if (more < 0 || count != 4 || seen != 15) return 0;
    packed_tensor *grown = packed_grow(p->tensors, p->tensor_count, sizeof t);
    if (grown == NULL) return 0;
    p->tensors = grown;
    p->tensors[p->tensor_count++] = t;
    return 1;
}

/* Check that the tensors tile the row of codes; tied tensors share an offset. */
static int packed_check_tiles(packed *p) {
    packed_tensor *sorted = malloc((p->tensor_count + 1) * sizeof *sorted);
    uint64_t end = 0;
    int good = sorted != NULL;
    if (good && p->tensor_count > 0) {
        memcpy(sorted, p->tensors, p->tensor_count * sizeof *sorted);
        qsort(sorted, p->tensor_count, sizeof *sorted, by_offset);
    }
    for (size_t i = 0; good && i < p->tensor_count; i++) {
        uint64_t size = (sorted[i].size + ALIGN - 1) / ALIGN * ALIGN;
        if (i > 0 && sorted[i].offset == sorted[i - 1].offset)
            good = size == (sorted[i - 1].size + ALIGN - 1) / ALIGN * ALIGN;
        else if (sorted[i].offset == end)
            end += size;
        else
            good = 0;
    }
    free(sorted);
    return good && end == p->codes;
}

/* The tensor "plane3" or "levels4", or NULL. */
static const packed_entry *packed_find(const packed *p, const char *kind, int number) {
    char name[24];
    snprintf(name, sizeof name, "%s%d", kind, number);
    for (size_t i = 0; i < p->entry_count; i++)
        if (equals(p->entries[i].name, name)) return &p->entries[i];
    return NULL;
}

static int packed_parse_header(packed *p, size_t size) {
    json j = {p->header, p->header + size};
    int count = 0, more, inner, seen = 0;
    uint64_t value = 0;
    text key;
    if (!json_take(&j, '{')) return packed_fail(p, "the header is not a JSON object");
    while ((more = json_next(&j, &count, '}', &key)) > 0) {
        int good = 1;
        if (equals(key, "stored_bits")) {
            good = json_integer(&j, &value) && value >= 1 && value <= 8;
            p->stored_bits = (int)value;
            seen |= 1;
        } else if (equals(key, "codes")) {
            good = json_integer(&j, &p->codes);
            seen |= 2;
        } else if (equals(key, "layers")) {
            if (p->tensor_count > 0) return packed_fail(p, "duplicate layer map");
            good = json_take(&j, '[');
            for (inner = 0; good && (more = json_next(&j, &inner, ']', NULL)) > 0;)
                good = packed_parse_tensor(p, &j);
            good = good && more == 0;
            seen |= 4;
        } else if (equals(key, "checksums")) {
            json_peek(&j);
            p->checksums.at = j.at;
            good = json_skip(&j, 0);
            p->checksums.size = (size_t)(j.at - p->checksums.at);
            seen |= 8;
        } else if (equals(key, "compression") || equals(key, "rest_of")) {
            int compression = equals(key, "compression");
            if (json_peek(&j) != 'n')
                return packed_fail(p, compression ? "the file is compressed; export it again without "
                                                    "--compress"
                                                  : "a rest file; join it with `export --add`");
            good = json_skip(&j, 0);
            seen |= compression ? 16 : 0;
        } else {
            good = json_skip(&j, 0);
        }
        if (!good) return packed_fail(p, "a header field is invalid");
    }
    if (more < 0 || seen != 31) return packed_fail(p, "the header is incomplete");
    if (p->codes >= SIZE_MAX / 2) return packed_fail(p, "the codes do not fit into memory");
    if (!packed_check_tiles(p)) return packed_fail(p, "the layer map does not tile the codes");
    for (int i = 0; i < p->stored_bits; i++) {
        const packed_entry *e = packed_find(p, "plane", i);
        if (e == NULL || !equals(e->dtype, "U8") || e->end - e->begin != p->codes / 8)
            return packed_fail(p, "a plane is missing or has another size");
    }
    return 1;
}

/* Open a file in memory, which must stay there. 1, or 0 with p->error; then call packed_close. */
int packed_open(packed *p, const uint8_t *data, size_t size) {
    uint64_t length = 0, end = 0;
    text key, format = {"", 0}, version = {"", 0}, header = {"", 0}, digest = {"", 0};
    int count = 0, inner = 0, more;
    size_t decoded = 0;
    char hex[64];
    sha256 sum;
    memset(p, 0, sizeof *p);
    for (int i = 7; size >= 8 && i >= 0; i--) length = length << 8 | data[i];
    if (size < 8 || length > MAX_HEADER || length > size - 8)
        return packed_fail(p, "not a packed file, or incomplete");
    const char *raw = (const char *)data + 8;
    json j = {raw, raw + length};
    if (!json_take(&j, '{')) return packed_fail(p, "not a packed file");
    while ((more = json_next(&j, &count, '}', &key)) > 0) {
        if (!equals(key, "__metadata__")) {
            if (!packed_parse_entry(p, &j, key)) return packed_fail(p, "a tensor entry is invalid");
            continue;
        }
        if (!json_take(&j, '{')) return packed_fail(p, "not a packed file");
        while ((more = json_next(&j, &inner, '}', &key)) > 0) {
            text value;
            if (!json_string(&j, &value)) return packed_fail(p, "the metadata are invalid");
            if (equals(key, "format")) format = value;
            if (equals(key, "format_version")) version = value;
            if (equals(key, "header")) header = value;
            if (equals(key, "header_sha256")) digest = value;
        }
        if (more < 0) break;
    }
    if (more < 0 || json_peek(&j) != 0) return packed_fail(p, "the file's header is not valid JSON");
    if (!equals(format, "tq_packed") || (!equals(version, "1") && !equals(version, "2")))
        return packed_fail(p, "not a packed file of version 1 or 2");
    if (digest.size != 64) return packed_fail(p, "the header has no checksum");
    sha256_start(&sum);
    sha256_add(&sum, raw, (size_t)(digest.at - raw));
    for (int i = 0; i < 64; i++) sha256_add(&sum, "0", 1);
    sha256_add(&sum, digest.at + 64, (size_t)(raw + length - digest.at - 64));
    sha256_hex(&sum, hex);
    if (memcmp(hex, digest.at, 64) != 0) return packed_fail(p, "the header is damaged");
    if (p->entry_count > 0) qsort(p->entries, p->entry_count, sizeof *p->entries, by_begin);
    for (size_t i = 0; i < p->entry_count; i++) {
        if (p->entries[i].begin != end) return packed_fail(p, "tensors overlap or leave a gap");
        end = p->entries[i].end;
    }
    if (end != size - 8 - length) return packed_fail(p, "the tensors do not fill the file");
    p->body = data + 8 + length;
    p->header = json_decode(header, &decoded);
    if (p->header == NULL) return packed_fail(p, "the header can't be decoded");
    return packed_parse_header(p, decoded);
}

void packed_close(packed *p) {
    free(p->entries);
    free(p->tensors);
    free(p->header);
    memset(p, 0, sizeof *p);
}

/* Compare the SHA-256 of a section that is one tensor with the header's. */
static int packed_check(packed *p, const packed_entry *e) {
    json j = {p->checksums.at, p->checksums.at + p->checksums.size};
    int count = 0;
    text key, value;
    char hex[64];
    sha256 sum;
    if (!json_take(&j, '{')) return 0;
    while (json_next(&j, &count, '}', &key) > 0) {
        if (!json_string(&j, &value)) return 0;
        if (key.size != e->name.size || memcmp(key.at, e->name.at, key.size) != 0) continue;
        sha256_start(&sum);
        sha256_add(&sum, p->body + e->begin, (size_t)(e->end - e->begin));
        sha256_hex(&sum, hex);
        return value.size == 64 && memcmp(hex, value.at, 64) == 0;
    }
    return 0;
}

/* Read the first `bits` planes into `codes` (p->codes bytes): codes of width `bits`. */
int packed_codes(packed *p, int bits, uint8_t *codes) {
    if (bits < 1 || bits > p->stored_bits) return packed_fail(p, "the file has fewer planes");
    memset(codes, 0, (size_t)p->codes);
    for (int plane = 0; plane < bits; plane++) {
        const packed_entry *e = packed_find(p, "plane", plane);
        if (e == NULL || !packed_check(p, e)) return packed_fail(p, "a plane is damaged");
        const uint8_t *from = p->body + e->begin;
        for (uint64_t i = 0; i < p->codes; i++)
            codes[i] = (uint8_t)(codes[i] << 1 | (from[i / 8] >> (7 - i % 8) & 1));
    }
    return 1;
}

/* The level of each code of a width, 2^bits floats. 1, or 0 if the file has no table of them. */
int packed_levels(packed *p, int bits, float *levels) {
    const packed_entry *e = bits < 1 || bits > 8 ? NULL : packed_find(p, "levels", bits);
    if (e == NULL) return packed_fail(p, "the levels are a formula");
    if (!equals(e->dtype, "F32") || e->end - e->begin != (uint64_t)4 << bits || !packed_check(p, e))
        return packed_fail(p, "a table of levels is damaged");
    for (const uint8_t *b = p->body + e->begin; b < p->body + e->end; b += 4) {
        uint32_t word = (uint32_t)b[3] << 24 | (uint32_t)b[2] << 16 | (uint32_t)b[1] << 8 | b[0];
        memcpy(levels++, &word, 4);
    }
    return 1;
}

/* Dot product of signed codes, k - 2^(bits - 1) as int8, with an int8 vector. */
int64_t packed_dot(const uint8_t *codes, const int8_t *x, size_t count, int bits) {
    const int middle = 1 << (bits - 1);
    int64_t total = 0;
    for (size_t i = 0; i < count;) {
        int32_t sum = 0; /* 2^16 products of at most 2^14 */
        size_t end = count - i > 65536 ? i + 65536 : count;
        for (; i < end; i++) sum += (int8_t)(codes[i] - middle) * x[i];
        total += sum;
    }
    return total;
}

/* ---- The command ----------------------------------------------------------------------------- */

#ifndef READ_PACKED_NO_MAIN

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL;
    *size = 0;
    for (size_t room = 1 << 16, got = 1; file != NULL && got > 0; room *= 2) {
        uint8_t *grown = realloc(data, room);
        if (grown == NULL) break;
        data = grown;
        got = fread(data + *size, 1, room - *size, file);
        *size += got;
    }
    if (file != NULL) fclose(file);
    return data;
}

int main(int argc, char **argv) {
    if ((argc != 3 && argc != 4) || strlen(argv[2]) != 1)
        return fprintf(stderr, "usage: read_packed FILE BITS [NAME]\n"), 2;
    packed p;
    size_t size;
    int bits = argv[2][0] - '0', found = argc == 3;
    uint8_t *data = read_file(argv[1], &size), *codes = NULL;
    int8_t *ramp = NULL;
    float levels[256];
    if (data == NULL) return fprintf(stderr, "read_packed: can't read %s\n", argv[1]), 2;
    if (!packed_open(&p, data, size) || (codes = malloc((size_t)p.codes + 1)) == NULL ||
        (ramp = malloc((size_t)p.codes + 1)) == NULL || !packed_codes(&p, bits, codes)) {
        fprintf(stderr, "read_packed: %s: %s\n", argv[1], p.error ? p.error : "out of memory");
        return 2;
    }
    for (uint64_t i = 0; i < p.codes; i++) ramp[i] = (int8_t)(i % 255 - 127);
    for (size_t t = 0; t < p.tensor_count; t++) {
        text name = p.tensors[t].name;
        const uint8_t *own = codes + p.tensors[t].offset;
        size_t count = (size_t)p.tensors[t].size;
        if (argc == 4 && equals(name, argv[3])) {
            fwrite(own, 1, count, stdout);
            found = 1;
        } else if (argc == 3) {
            unsigned least = 255, most = 0;
            for (size_t i = 0; i < count; i++) {
                least = own[i] < least ? own[i] : least;
                most = own[i] > most ? own[i] : most;
            }
            printf("%.*s %zu %u %u %lld\n", (int)name.size, name.at, count, least, most,
                   (long long)packed_dot(own, ramp, count, bits));
        }
    }
    if (argc == 3 && packed_levels(&p, bits, levels)) {
        for (int k = 0; k < 1 << bits; k++) printf(k > 0 ? " %.9g" : "levels %.9g", levels[k]);
        printf("\n");
    }
    if (!found) fprintf(stderr, "read_packed: no tensor %s in %s\n", argv[3], argv[1]);
    packed_close(&p);
    free(ramp);
    free(codes);
    free(data);
    if (fflush(stdout) != 0 || ferror(stdout)) return perror("read_packed: standard output"), 2;
    return found ? 0 : 2;
}

#endif
