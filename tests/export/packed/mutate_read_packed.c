/* Open mutated files with docs/read_packed.c, most of them with a correct checksum of the header.
 *
 * Usage: mutate FILE COUNT SEED. Prints how many were opened and how many were refused. Compile
 * with sanitizers: each mutant has a buffer of its exact size.
 */

#define READ_PACKED_NO_MAIN
#include "../../../docs/read_packed.c"

static uint64_t state;

static uint64_t draw(uint64_t below) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below > 0 ? state % below : 0;
}

static uint64_t header_length(const uint8_t *data) {
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | data[i];
    return length;
}

/* Correct the header's checksum, if it can be found. */
static void sign(uint8_t *data, size_t size) {
    static const char field[] = "\"header_sha256\":\"";
    uint64_t length = size >= 8 ? header_length(data) : 0;
    if (size < 8 || length > size - 8) return;
    for (size_t i = 8; i + sizeof field - 1 + 64 <= 8 + length; i++) {
        if (memcmp(data + i, field, sizeof field - 1) != 0) continue;
        char hex[64];
        sha256 sum;
        memset(data + i + sizeof field - 1, '0', 64);
        sha256_start(&sum);
        sha256_add(&sum, data + 8, (size_t)length);
        sha256_hex(&sum, hex);
        memcpy(data + i + sizeof field - 1, hex, 64);
        return;
    }
}

int main(int argc, char **argv) {
    static const char *const tokens[] = {"0",  "1",   "64",   "281474976710655", "-1", "1e9",
                                         "[",  "]",   "{",    "}",               ",",  ":",
                                         "\"", "\\\"", "\\\\", "\\u0041",         "null", "[[[[[[[["};
    static uint8_t original[1 << 22];
    FILE *file = argc == 4 ? fopen(argv[1], "rb") : NULL;
    if (file == NULL) return 2;
    size_t whole = fread(original, 1, sizeof original, file);
    fclose(file);
    long opened = 0, refused = 0, count = atol(argv[2]);
    state = (uint64_t)atol(argv[3]) * 2 + 1;
    for (long n = 0; n < count; n++) {
        size_t size = whole;
        uint8_t *data = malloc(size + 64);
        memcpy(data, original, size);
        for (uint64_t edits = draw(4); edits < 4; edits++) {
            uint64_t length = size >= 8 ? header_length(data) : 0;
            uint64_t range = draw(10) > 0 && length > 0 && length < size - 8 ? 8 + length : size;
            size_t at = (size_t)draw(range);
            const char *token = tokens[draw(sizeof tokens / sizeof *tokens)];
            size_t some = strlen(token);
            switch (draw(6)) {
                case 0: data[at] ^= (uint8_t)(1 << draw(8)); break;
                case 1: data[at] = (uint8_t)draw(256); break;
                case 2: data[at] = (uint8_t)('0' + draw(10)); break;
                case 3: /* overwrite by a token */
                    if (at + some <= size) memcpy(data + at, token, some);
                    break;
                case 4: /* remove a byte, and keep the header's length right */
                    memmove(data + at, data + at + 1, size - at - 1);
                    if (at >= 8 && at < 8 + length) data[0]--;
                    size--;
                    break;
                default:
                    if (draw(8) == 0) size = (size_t)draw(size) + 1; /* cut */
            }
        }
        if (draw(8) > 0) sign(data, size);
        uint8_t *exact = malloc(size); /* so that reading a byte beyond it is noticed */
        memcpy(exact, data, size);
        free(data);
        packed p;
        if (packed_open(&p, exact, size)) {
            uint8_t *codes = malloc((size_t)p.codes + 1);
            int8_t *x = calloc((size_t)p.codes + 1, 1);
            int good = codes != NULL && x != NULL && packed_codes(&p, p.stored_bits, codes);
            for (size_t t = 0; good && t < p.tensor_count; t++)
                packed_dot(codes + p.tensors[t].offset, x, (size_t)p.tensors[t].size, p.stored_bits);
            float levels[256];
            for (int bits = 0; good && bits <= 9; bits++) packed_levels(&p, bits, levels);
            good ? opened++ : refused++;
            free(x);
            free(codes);
        } else {
            if (p.error == NULL) return 3;
            refused++;
        }
        packed_close(&p);
        free(exact);
    }
    printf("%ld opened, %ld refused\n", opened, refused);
    return 0;
}
