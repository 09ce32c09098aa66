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
void split_portable(const std::uint8_t* items, std::size_t first, std::size_t count, std::uint8_t* planes) {
  for (std::size_t start = first; start < count; start += kBlockItems) {
    const std::size_t end = std::min(count, start + kBlockItems);
    for (std::size_t plane = 0; plane < kItem; ++plane) {
      for (std::size_t at = start; at < end; ++at) planes[plane * count + at] = items[at * kItem + plane];
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

CIUIC_AVX2 std::size_t split2(const std::uint8_t* items, std::size_t count, std::uint8_t* planes) {
  const std::size_t done = count & ~std::size_t{31};
  const __m256i low_byte = _mm256_set1_epi16(0x00FF);
  for (std::size_t at = 0; at < done; at += 32) {
    const __m256i a = load(items + at * 2);
    const __m256i b = load(items + at * 2 + 32);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, low_byte), _mm256_and_si256(b, low_byte));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    store(planes + at, _mm256_permute4x64_epi64(low, 0xD8));  // packing works in 128-bit lanes: put them in order
    store(planes + count + at, _mm256_permute4x64_epi64(high, 0xD8));
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

CIUIC_AVX2 std::size_t split4(const std::uint8_t* items, std::size_t count, std::uint8_t* planes) {
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
    store(planes + count + at, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x20));
    store(planes + count * 2 + at, _mm256_permute2x128_si256(ab_even, cd_even, 0x31));
    store(planes + count * 3 + at, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x31));
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
std::size_t split2(const std::uint8_t*, std::size_t, std::uint8_t*) { return 0; }
std::size_t split4(const std::uint8_t*, std::size_t, std::uint8_t*) { return 0; }
std::size_t merge2(const std::uint8_t* const*, std::size_t, std::uint8_t*) { return 0; }
std::size_t merge4(const std::uint8_t* const*, std::size_t, std::uint8_t*) { return 0; }

#endif

}  // namespace

bool is_item_size(std::size_t item_size_bytes) noexcept {
  return item_size_bytes >= 1 && item_size_bytes <= kMaxItemBytes && (item_size_bytes & (item_size_bytes - 1)) == 0;
}

void split_planes(const std::uint8_t* items, std::size_t count, std::size_t item_size_bytes,
                  std::uint8_t* planes) noexcept {
  switch (item_size_bytes) {
    case 1:
      if (count > 0) std::memcpy(planes, items, count);
      return;
    case 2:
      return split_portable<2>(items, has_avx2() ? split2(items, count, planes) : 0, count, planes);
    case 4:
      return split_portable<4>(items, has_avx2() ? split4(items, count, planes) : 0, count, planes);
    case 8:
      return split_portable<8>(items, 0, count, planes);
    default:
      return split_portable<16>(items, 0, count, planes);
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
