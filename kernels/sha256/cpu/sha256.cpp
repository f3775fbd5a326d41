// SHA-256 of 16 messages at once, one per 32-bit lane of an AVX-512 register.
//
// One message is a chain: each round waits for the one before, also in the processor's SHA instructions (1.1 GB/s on the Xeon measured).
// Chunks of a weight file are independent of each other: 16 of them keep both vector units busy, at 3.7 GB/s.
//
// Levels without AVX-512 have no instruction of it, here neither: hashlib hashes there.
// Source: FIPS 180-4, sections 4.1.2, 4.2.2, 5.1.1, 5.3.3 and 6.2.2; names as there.

#include "sha256/cpu/sha256.h"

#include <immintrin.h>

#include <cstring>

// GCC 12 takes the undefined operand that its own intrinsics pass for ours (https://gcc.gnu.org/PR105593); gone in 13.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#if defined(__AVX512F__) && defined(__AVX512BW__)
namespace {

constexpr int LANES = LLMC_SHA256_LANES;
constexpr int BLOCK = 64;         // bytes
constexpr int AHEAD = 8 * BLOCK;  // prefetched: 16 streams are more than the processor's prefetcher follows

constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
constexpr uint32_t H0[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// Truth tables of three-operand logic (first operand is the high bit of the row).
constexpr int XOR3 = 0x96, CH = 0xca, MAJ = 0xe8;

inline __m512i big_sigma_0(__m512i x) {
  return _mm512_ternarylogic_epi32(_mm512_ror_epi32(x, 2), _mm512_ror_epi32(x, 13), _mm512_ror_epi32(x, 22), XOR3);
}
inline __m512i big_sigma_1(__m512i x) {
  return _mm512_ternarylogic_epi32(_mm512_ror_epi32(x, 6), _mm512_ror_epi32(x, 11), _mm512_ror_epi32(x, 25), XOR3);
}
inline __m512i small_sigma_0(__m512i x) {
  return _mm512_ternarylogic_epi32(_mm512_ror_epi32(x, 7), _mm512_ror_epi32(x, 18), _mm512_srli_epi32(x, 3), XOR3);
}
inline __m512i small_sigma_1(__m512i x) {
  return _mm512_ternarylogic_epi32(_mm512_ror_epi32(x, 17), _mm512_ror_epi32(x, 19), _mm512_srli_epi32(x, 10), XOR3);
}

// rows[l] holds 16 words of message l; afterwards rows[t] holds word t of 16 messages.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Take `blocks` blocks of every message into the state: 8 words, each of 16 messages.
void compress(__m512i* state, const uint8_t* const* messages, int64_t blocks) {
  const __m512i big_endian = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203));
  for (int64_t block = 0; block < blocks; block++) {
    __m512i w[16];
    for (int l = 0; l < LANES; l++) {
      const uint8_t* at = messages[l] + block * BLOCK;
      w[l] = _mm512_shuffle_epi8(_mm512_loadu_si512(at), big_endian);
      _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);  // past the end it does nothing
    }
    transpose(w);
    __m512i a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
#pragma GCC unroll 64
    for (int t = 0; t < 64; t++) {
      const __m512i wt = w[t % 16];
      __m512i t1 = _mm512_add_epi32(h, _mm512_add_epi32(wt, _mm512_set1_epi32(static_cast<int>(K[t]))));
      t1 = _mm512_add_epi32(_mm512_add_epi32(t1, _mm512_ternarylogic_epi32(e, f, g, CH)), big_sigma_1(e));
      const __m512i t2 = _mm512_add_epi32(big_sigma_0(a), _mm512_ternarylogic_epi32(a, b, c, MAJ));
      h = g, g = f, f = e, e = _mm512_add_epi32(d, t1), d = c, c = b, b = a, a = _mm512_add_epi32(t1, t2);
      if (t < 48)  // word t + 16 takes the place of word t
        w[t % 16] = _mm512_add_epi32(_mm512_add_epi32(wt, small_sigma_0(w[(t + 1) % 16])),
                                     _mm512_add_epi32(w[(t + 9) % 16], small_sigma_1(w[(t + 14) % 16])));
    }
    state[0] = _mm512_add_epi32(state[0], a);
    state[1] = _mm512_add_epi32(state[1], b);
    state[2] = _mm512_add_epi32(state[2], c);
    state[3] = _mm512_add_epi32(state[3], d);
    state[4] = _mm512_add_epi32(state[4], e);
    state[5] = _mm512_add_epi32(state[5], f);
    state[6] = _mm512_add_epi32(state[6], g);
    state[7] = _mm512_add_epi32(state[7], h);
  }
}

void hash(const LlmcSha256Args& args) {
  const int64_t whole = args.message_bytes / BLOCK, rest = args.message_bytes % BLOCK;
  const int64_t tail_blocks = rest + 9 > BLOCK ? 2 : 1;  // 0x80 and the length, 8 bytes, must fit
  const uint8_t* messages[LANES];
  const uint8_t* ends[LANES];
  uint8_t tails[LANES][2 * BLOCK] = {};
  for (int l = 0; l < LANES; l++) {
    messages[l] = static_cast<const uint8_t*>(args.messages[l < args.num_messages ? l : 0]);
    if (rest > 0) memcpy(tails[l], messages[l] + whole * BLOCK, static_cast<size_t>(rest));
    tails[l][rest] = 0x80;
    for (int i = 0; i < 8; i++) tails[l][tail_blocks * BLOCK - 1 - i] = static_cast<uint8_t>(static_cast<uint64_t>(args.message_bytes) * 8 >> 8 * i);
    ends[l] = tails[l];
  }
  __m512i state[8];
  for (int i = 0; i < 8; i++) state[i] = _mm512_set1_epi32(static_cast<int>(H0[i]));
  compress(state, messages, whole);
  compress(state, ends, tail_blocks);
  alignas(64) uint32_t words[8][LANES];
  for (int i = 0; i < 8; i++) _mm512_store_si512(words[i], state[i]);
  for (int64_t l = 0; l < args.num_messages; l++)
    for (int i = 0; i < 8; i++)
      for (int byte = 0; byte < 4; byte++) args.digests[l * LLMC_SHA256_BYTES + 4 * i + byte] = static_cast<uint8_t>(words[i][l] >> (24 - 8 * byte));
}

}  // namespace
#endif

int32_t llmc_sha256(const LlmcSha256Args* args) {
  if (args->struct_bytes != sizeof(LlmcSha256Args)) return LLMC_BAD_STRUCT;
  if (args->num_messages < 1 || args->num_messages > LLMC_SHA256_LANES || args->message_bytes < 0 || args->message_bytes > int64_t{1} << 60) return LLMC_BAD_SHAPE;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  hash(*args);
  return LLMC_OK;
#else
  return LLMC_NO_HARDWARE;
#endif
}
