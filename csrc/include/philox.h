// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the same bits on every backend.
//
// Element i of a tensor, counted in its logical order, takes word i % 4 of counter i / 4; a call is told apart from the
// next by its offset, a run by its seed. nfkernels/reference/philox.py is the specification.
#pragma once

#include "scalar_math.h"

namespace nf {

// [seed, offset] as 32-bit words, low first.
struct PhiloxKey {
  uint32_t seed[2], offset[2];
};

struct PhiloxWords {
  uint32_t a, b, c, d;
};

namespace {

NF_FN PhiloxKey philox_key(const int64_t* key) {
  const uint64_t seed = static_cast<uint64_t>(key[0]), offset = static_cast<uint64_t>(key[1]);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}};
}

// `i`: which of the ten.
NF_FN PhiloxWords philox_round(PhiloxWords v, const PhiloxKey& k, uint32_t i) {
  const uint64_t p = uint64_t{0xD2511F53u} * v.a, q = uint64_t{0xCD9E8D57u} * v.c;
  return {static_cast<uint32_t>(q >> 32) ^ v.b ^ (k.seed[0] + i * 0x9E3779B9u), static_cast<uint32_t>(q),
          static_cast<uint32_t>(p >> 32) ^ v.d ^ (k.seed[1] + i * 0xBB67AE85u), static_cast<uint32_t>(p)};
}

// No loop over the rounds: a CPU's loop over counters has to vectorise around them.
NF_FN PhiloxWords philox(uint64_t counter, const PhiloxKey& k) {
  PhiloxWords v{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), k.offset[0], k.offset[1]};
  v = philox_round(v, k, 0);
  v = philox_round(v, k, 1);
  v = philox_round(v, k, 2);
  v = philox_round(v, k, 3);
  v = philox_round(v, k, 4);
  v = philox_round(v, k, 5);
  v = philox_round(v, k, 6);
  v = philox_round(v, k, 7);
  v = philox_round(v, k, 8);
  return philox_round(v, k, 9);
}

// A word as a number in [0, 1): a multiple of 2^-24, so the same in every type.
NF_FN float philox_unit(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 5.9604644775390625e-8f;
}

}  // namespace
}  // namespace nf
