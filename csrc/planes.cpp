#include "planes.h"

#include <algorithm>
#include <cstring>

#include "segment_format.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ciuic {
namespace {

constexpr std::size_t kBlockItems = 2048;  // 32 KiB of the largest items: a block is read from memory once

template <std::size_t kItem>
void split_portable(const std::uint8_t* items, std::size_t first, std::size_t count, std::uint8_t* planes,
                    std::size_t stride) {
  for (std::size_t start = first; start < count; start += kBlockItems) {
    const std::size_t end = std::min(count, start + kBlockItems);
    for (std::size_t plane = 0; plane < kItem; ++plane) {
      for (std::size_t at = start; at < end; ++at) planes[plane * stride + at] = items[at * kItem + plane];
    }
  }
}

template <std::size_t kItem>
void merge_portable(const std::uint8_t* const* planes, std::size_t first, std::size_t count, std::uint8_t* items) {
  for (std::size_t start = first; start < count; start += kBlockItems) {
    const std::size_t end = std::min(count, start + kBlockItems);
    for (std::size_t plane = 0; plane < kItem; ++plane) {
      const std::uint8_t* source = planes[plane];
      for (std::size_t at = start; at < end; ++at) items[at * kItem + plane] = source[at];
    }
  }
}

// The kernels below return how many items they did, a multiple of 32; the portable loops do the rest.

#if defined(__x86_64__)

bool has_avx2() {
  static const bool supported = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
  }();
  return supported;
}

#define CIUIC_AVX2 __attribute__((target("avx2")))

CIUIC_AVX2 __m256i load(const std::uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

CIUIC_AVX2 void store(std::uint8_t* to, __m256i value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }

CIUIC_AVX2 std::size_t split2(const std::uint8_t* items, std::size_t count, std::uint8_t* planes,
                               std::size_t stride) {
  const std::size_t done = count & ~std::size_t{31};
  const __m256i low_byte = _mm256_set1_epi16(0x00FF);
  for (std::size_t at = 0; at < done; at += 32) {
    const __m256i a = load(items + at * 2);
    const __m256i b = load(items + at * 2 + 32);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    store(planes + at, _mm256_permute4x64_epi64(low, 0xD8));  // packing works in 128-bit lanes: put them in order
    store(planes + stride + at, _mm256_permute4x64_epi64(high, 0xD8));
  }
  return done;
}

CIUIC_AVX2 std::size_t merge2(const std::uint8_t* const* planes, std::size_t count, std::uint8_t* items) {
  const std::size_t done = count & ~std::size_t{31};
  for (std::size_t at = 0; at < done; at += 32) {
    const __m256i low = load(planes[0] + at);
    const __m256i high = load(planes[1] + at);
    const __m256i a = _mm256_unpacklo_epi8(low, high);
    const __m256i b = _mm256_unpackhi_epi8(low, high);
    store(items + at * 2, _mm256_permute2x128_si256(a, b, 0x20));
    store(items + at * 2 + 32, _mm256_permute2x128_si256(a, b, 0x31));
  }
  return done;
}

// Eight items of 4 bytes as four groups of 8 bytes: byte 0 of all, byte 1 of all, ...
CIUIC_AVX2 __m256i group4(const std::uint8_t* items) {
  const __m256i within = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i across = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(load(items), within), across);
}

CIUIC_AVX2 std::size_t split4(const std::uint8_t* items, std::size_t count, std::uint8_t* planes,
                               std::size_t stride) {
  const std::size_t done = count & ~std::size_t{31};
  for (std::size_t at = 0; at < done; at += 32) {
    const __m256i a = group4(items + at * 4);
    const __m256i b = group4(items + at * 4 + 32);
    const __m256i c = group4(items + at * 4 + 64);
    const __m256i d = group4(items + at * 4 + 96);
    const __m256i ab_even = _mm256_unpacklo_epi64(a, b);  // planes 0 and 2 of a and b
    const __m256i ab_odd = _mm256_unpackhi_epi64(a, b);
    const __m256i cd_even = _mm256_unpacklo_epi64(c, d);
    const __m256i cd_odd = _mm256_unpackhi_epi64(c, d);
    store(planes + at, _mm256_permute2x128_si256(ab_even, cd_even, 0x20));
    store(planes + stride + at, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x20));
    store(planes + stride * 2 + at, _mm256_permute2x128_si256(ab_even, cd_even, 0x31));
    store(planes + stride * 3 + at, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x31));
  }
  return done;
}

CIUIC_AVX2 std::size_t merge4(const std::uint8_t* const* planes, std::size_t count, std::uint8_t* items) {
  const std::size_t done = count & ~std::size_t{31};
  for (std::size_t at = 0; at < done; at += 32) {
    const __m256i p0 = load(planes[0] + at);
    const __m256i p1 = load(planes[1] + at);
    const __m256i p2 = load(planes[2] + at);
    const __m256i p3 = load(planes[3] + at);
    const __m256i low01 = _mm256_unpacklo_epi8(p0, p1);
    const __m256i high01 = _mm256_unpackhi_epi8(p0, p1);
    const __m256i low23 = _mm256_unpacklo_epi8(p2, p3);
    const __m256i high23 = _mm256_unpackhi_epi8(p2, p3);
    const __m256i a = _mm256_unpacklo_epi16(low01, low23);  // items 0-3 and 16-19
    const __m256i b = _mm256_unpackhi_epi16(low01, low23);  // items 4-7 and 20-23
    const __m256i c = _mm256_unpacklo_epi16(high01, high23);
    const __m256i d = _mm256_unpackhi_epi16(high01, high23);
    store(items + at * 4, _mm256_permute2x128_si256(a, b, 0x20));
    store(items + at * 4 + 32, _mm256_permute2x128_si256(c, d, 0x20));
    store(items + at * 4 + 64, _mm256_permute2x128_si256(a, b, 0x31));
    store(items + at * 4 + 96, _mm256_permute2x128_si256(c, d, 0x31));
  }
  return done;
}

#else

bool has_avx2() { return false; }
std::size_t split2(const std::uint8_t*, std::size_t, std::uint8_t*, std::size_t) { return 0; }
std::size_t split4(const std::uint8_t*, std::size_t, std::uint8_t*, std::size_t) { return 0; }
std::size_t merge2(const std::uint8_t* const*, std::size_t, std::uint8_t*) { return 0; }
std::size_t merge4(const std::uint8_t* const*, std::size_t, std::uint8_t*) { return 0; }

#endif

// --- transforms ------------------------------------------------------------------------------------------------------

template <typename Word>
constexpr unsigned kWordBits = 8 * sizeof(Word);

template <typename Word>
Word rotated(Word word) {
  return static_cast<Word>(word << 1 | word >> (kWordBits<Word> - 1));
}

// The upper 16 bits rotated left by one: a float's sign leaves its exponent, and its low bits stay where they are.
template <typename Word>
Word sign_below(Word word) {
  constexpr unsigned low = kWordBits<Word> - 16;
  const auto upper = static_cast<std::uint16_t>(word >> low);
  return static_cast<Word>((static_cast<Word>(static_cast<std::uint16_t>(upper << 1 | upper >> 15)) << low) |
                           static_cast<Word>(word & ((Word{1} << low) - 1)));
}

template <typename Word>
Word sign_above(Word word) {
  constexpr unsigned low = kWordBits<Word> - 16;
  const auto upper = static_cast<std::uint16_t>(word >> low);
  return static_cast<Word>((static_cast<Word>(static_cast<std::uint16_t>(upper >> 1 | upper << 15)) << low) |
                           static_cast<Word>(word & ((Word{1} << low) - 1)));
}

// Signed integers of small size become small unsigned ones: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...
template <typename Word>
Word difference(Word word, Word base) {
  const auto delta = static_cast<Word>(rotated(word) - rotated(base));
  const auto negative = static_cast<Word>(Word{0} - (delta >> (kWordBits<Word> - 1)));
  return static_cast<Word>(static_cast<Word>(delta << 1) ^ negative);
}

template <typename Word>
Word undo_difference(Word zigzag, Word base) {
  const auto delta = static_cast<Word>((zigzag >> 1) ^ static_cast<Word>(Word{0} - (zigzag & 1)));
  const auto word = static_cast<Word>(rotated(base) + delta);
  return static_cast<Word>(word >> 1 | word << (kWordBits<Word> - 1));
}

enum class Way { kForward, kBack };

// `to` may be `items`. Memory need not be aligned: each word is copied, which compiles to vector loads.
template <typename Word, Way kWay>
inline __attribute__((always_inline)) void transform_words(Transform transform, const std::uint8_t* items,
                                                           const std::uint8_t* base, std::size_t count,
                                                           std::uint8_t* to) {
  const auto each = [&](auto apply) {
    for (std::size_t at = 0; at < count * sizeof(Word); at += sizeof(Word)) {
      Word word;
      std::memcpy(&word, items + at, sizeof(Word));
      word = apply(word, at);
      std::memcpy(to + at, &word, sizeof(Word));
    }
  };
  const auto base_at = [base](std::size_t at) {
    Word word;
    std::memcpy(&word, base + at, sizeof(Word));
    return word;
  };
  switch (transform) {
    case Transform::kXor:
      return each([&](Word word, std::size_t at) { return static_cast<Word>(word ^ base_at(at)); });
    case Transform::kDifference:
      if constexpr (kWay == Way::kForward) {
        return each([&](Word word, std::size_t at) { return difference<Word>(word, base_at(at)); });
      } else {
        return each([&](Word word, std::size_t at) { return undo_difference<Word>(word, base_at(at)); });
      }
    case Transform::kRotated:
      if constexpr (sizeof(Word) == 1) {
        return;
      } else if constexpr (kWay == Way::kForward) {
        return each([](Word word, std::size_t) { return sign_below<Word>(word); });
      } else {
        return each([](Word word, std::size_t) { return sign_above<Word>(word); });
      }
    case Transform::kNone:
      return;
  }
}

template <Way kWay>
inline __attribute__((always_inline)) void transform_items(Transform transform, const std::uint8_t* items,
                                                           const std::uint8_t* base, std::size_t count,
                                                           std::size_t item_size_bytes, std::uint8_t* to) {
  switch (item_size_bytes) {
    case 2:
      return transform_words<std::uint16_t, kWay>(transform, items, base, count, to);
    case 4:
      return transform_words<std::uint32_t, kWay>(transform, items, base, count, to);
    case 8:
      return transform_words<std::uint64_t, kWay>(transform, items, base, count, to);
    case 16:
      return transform_words<std::uint64_t, kWay>(transform, items, base, count * 2, to);
    default:
      return transform_words<std::uint8_t, kWay>(transform, items, base, count, to);
  }
}

template <Way kWay>
void transform_portable(Transform transform, const std::uint8_t* items, const std::uint8_t* base, std::size_t count,
                        std::size_t item_size_bytes, std::uint8_t* to) {
  transform_items<kWay>(transform, items, base, count, item_size_bytes, to);
}

#if defined(__x86_64__)
template <Way kWay>
CIUIC_AVX2 void transform_avx2(Transform transform, const std::uint8_t* items, const std::uint8_t* base,
                               std::size_t count, std::size_t item_size_bytes, std::uint8_t* to) {
  transform_items<kWay>(transform, items, base, count, item_size_bytes, to);
}
#endif

template <Way kWay>
void transform_block(Transform transform, const std::uint8_t* items, const std::uint8_t* base, std::size_t count,
                     std::size_t item_size_bytes, std::uint8_t* to) {
#if defined(__x86_64__)
  if (has_avx2()) return transform_avx2<kWay>(transform, items, base, count, item_size_bytes, to);
#endif
  transform_portable<kWay>(transform, items, base, count, item_size_bytes, to);
}

void split_strided(const std::uint8_t* items, std::size_t count, std::size_t item_size_bytes, std::uint8_t* planes,
                   std::size_t stride) noexcept {
  switch (item_size_bytes) {
    case 1:
      if (count > 0) std::memcpy(planes, items, count);
      return;
    case 2:
      return split_portable<2>(items, has_avx2() ? split2(items, count, planes, stride) : 0, count, planes, stride);
    case 4:
      return split_portable<4>(items, has_avx2() ? split4(items, count, planes, stride) : 0, count, planes, stride);
    case 8:
      return split_portable<8>(items, 0, count, planes, stride);
    default:
      return split_portable<16>(items, 0, count, planes, stride);
  }
}

}  // namespace

bool is_item_size(std::size_t item_size_bytes) noexcept {
  return item_size_bytes >= 1 && item_size_bytes <= kMaxItemBytes && (item_size_bytes & (item_size_bytes - 1)) == 0;
}

bool is_transform(unsigned number, std::size_t item_size_bytes) noexcept {
  const bool in_words = item_size_bytes == 2 || item_size_bytes == 4 || item_size_bytes == 8;
  return number <= 1 || (number <= 3 && in_words);
}

void split_planes(const std::uint8_t* items, std::size_t count, std::size_t item_size_bytes,
                  std::uint8_t* planes) noexcept {
  split_strided(items, count, item_size_bytes, planes, count);
}

void split_transformed(Transform transform, const std::uint8_t* items, const std::uint8_t* base, std::size_t count,
                       std::size_t item_size_bytes, std::uint8_t* planes) noexcept {
  if (transform == Transform::kNone) return split_planes(items, count, item_size_bytes, planes);
  std::uint8_t block[kBlockItems * kMaxItemBytes];  // stays in the cache: memory is read and written once
  for (std::size_t start = 0; start < count; start += kBlockItems) {
    const std::size_t size = std::min(kBlockItems, count - start);
    const std::size_t at = start * item_size_bytes;
    const std::uint8_t* const base_block = base != nullptr ? base + at : nullptr;
    transform_block<Way::kForward>(transform, items + at, base_block, size, item_size_bytes, block);
    split_strided(block, size, item_size_bytes, planes + start, count);
  }
}

void merge_transformed(Transform transform, const std::uint8_t* const* planes, const std::uint8_t* base,
                       std::size_t count, std::size_t item_size_bytes, std::uint8_t* items) noexcept {
  if (transform == Transform::kNone) return merge_planes(planes, count, item_size_bytes, items);
  for (std::size_t start = 0; start < count; start += kBlockItems) {
    const std::size_t size = std::min(kBlockItems, count - start);
    const std::uint8_t* shifted[kMaxItemBytes];
    for (std::size_t plane = 0; plane < item_size_bytes; ++plane) shifted[plane] = planes[plane] + start;
    const std::size_t at = start * item_size_bytes;
    merge_planes(shifted, size, item_size_bytes, items + at);
    const std::uint8_t* const base_block = base != nullptr ? base + at : nullptr;
    transform_block<Way::kBack>(transform, items + at, base_block, size, item_size_bytes, items + at);
  }
}

void merge_planes(const std::uint8_t* const* planes, std::size_t count, std::size_t item_size_bytes,
                  std::uint8_t* items) noexcept {
  switch (item_size_bytes) {
    case 1:
      if (count > 0) std::memcpy(items, planes[0], count);
      return;
    case 2:
      return merge_portable<2>(planes, has_avx2() ? merge2(planes, count, items) : 0, count, items);
    case 4:
      return merge_portable<4>(planes, has_avx2() ? merge4(planes, count, items) : 0, count, items);
    case 8:
      return merge_portable<8>(planes, 0, count, items);
    default:
      return merge_portable<16>(planes, 0, count, items);
  }
}

}  // namespace ciuic
