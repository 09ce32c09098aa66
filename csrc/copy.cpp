#include "copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>

#include <sys/mman.h>
#include <unistd.h>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ciuic {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kStreamMinimumBytes = std::size_t{256} << 10;  // copies smaller in all stay in the caches
constexpr std::size_t kStreamRangeBytes = std::size_t{4} << 10;      // of a big copy, below this memcpy wins
constexpr std::size_t kThreadMinimumBytes = std::size_t{1} << 20;    // below, starting a thread costs more than it saves

// A kernel copies whole lines to a destination that starts at one, and to `twin`, if there is one, through the caches.
using StreamKernel = void (*)(char*, char*, const char*, std::size_t);

void stream_portable(char* destination, char* twin, const char* source, std::size_t size) {
  if (twin != nullptr) {
    std::memcpy(twin, source, size);
    source = twin;
  }
  std::memcpy(destination, source, size);
}

#if defined(__x86_64__)

void stream_sse2(char* destination, char* twin, const char* source, std::size_t size) {
  for (std::size_t at = 0; at < size; at += kLine) {
    for (std::size_t part = 0; part < kLine; part += 16) {
      const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(destination + at + part), value);
      if (twin != nullptr) _mm_storeu_si128(reinterpret_cast<__m128i*>(twin + at + part), value);
    }
  }
  _mm_sfence();
}

__attribute__((target("avx2"))) void stream_avx2(char* destination, char* twin, const char* source, std::size_t size) {
  for (std::size_t at = 0; at < size; at += kLine) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + at + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(destination + at), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(destination + at + 32), high);
    if (twin == nullptr) continue;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(twin + at), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(twin + at + 32), high);
  }
  _mm_sfence();
}

__attribute__((target("avx512f"))) void stream_avx512(char* destination, char* twin, const char* source, std::size_t size) {
  for (std::size_t at = 0; at < size; at += kLine) {
    const __m512i line = _mm512_loadu_si512(source + at);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + at), line);
    if (twin != nullptr) _mm512_storeu_si512(twin + at, line);
  }
  _mm_sfence();
}

StreamKernel choose_kernel() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return stream_avx512;
  if (__builtin_cpu_supports("avx2")) return stream_avx2;
  return stream_sse2;
}

#else

StreamKernel choose_kernel() { return stream_portable; }

#endif

const StreamKernel stream_kernel = choose_kernel();

void copy_cached(char* destination, char* twin, const char* source, std::size_t size_bytes) noexcept {
  if (twin != nullptr) {
    std::memcpy(twin, source, size_bytes);
    source = twin;  // somebody may be writing to the source: both copies are to be the same
  }
  std::memcpy(destination, source, size_bytes);
}

// At least a line.
void stream(char* destination, char* twin, const char* source, std::size_t size_bytes) noexcept {
  const auto twin_at = [twin](std::size_t at) { return twin == nullptr ? nullptr : twin + at; };
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(destination) & (kLine - 1);
  const std::size_t body = (size_bytes - head) & ~(kLine - 1);
  const std::size_t tail = head + body;
  copy_cached(destination, twin, source, head);
  stream_kernel(destination + head, twin_at(head), source + head, body);
  copy_cached(destination + tail, twin_at(tail), source + tail, size_bytes - tail);
}

void copy_share(const std::vector<CopyRange>& share, bool streams) noexcept {
  for (const CopyRange& range : share) {
    if (range.source == nullptr) {
      std::memset(range.destination, 0, range.size_bytes);
    } else if (streams && range.size_bytes >= kStreamRangeBytes) {
      stream(range.destination, nullptr, range.source, range.size_bytes);
    } else {
      std::memcpy(range.destination, range.source, range.size_bytes);
    }
  }
}

// Cuts `ranges` into `count` lists of about equal bytes.
std::vector<std::vector<CopyRange>> divide(const std::vector<CopyRange>& ranges, std::size_t total, unsigned count) {
  std::vector<std::vector<CopyRange>> shares(count);
  const std::size_t share_bytes = total / count + kLine;
  std::size_t current = 0;
  std::size_t room = share_bytes;
  for (CopyRange rest : ranges) {
    while (rest.size_bytes > 0) {
      if (room == 0 && current + 1 < count) {
        ++current;
        room = share_bytes;
      }
      std::size_t take = rest.size_bytes;
      if (take > room && current + 1 < count) {
        // End at a line of the destination, so that no two threads write to one line.
        const auto start = reinterpret_cast<std::uintptr_t>(rest.destination);
        take = std::min(take, ((start + room + kLine - 1) & ~(kLine - 1)) - start);
      }
      shares[current].push_back({rest.destination, rest.source, take});
      const char* const source = rest.source == nullptr ? nullptr : rest.source + take;
      rest = {rest.destination + take, source, rest.size_bytes - take};
      room -= std::min(room, take);
    }
  }
  return shares;
}

}  // namespace

void copy_stream(char* destination, const char* source, std::size_t size_bytes) noexcept {
  if (size_bytes >= kStreamMinimumBytes) {
    stream(destination, nullptr, source, size_bytes);
  } else {
    std::memcpy(destination, source, size_bytes);
  }
}

void copy_many(const std::vector<CopyRange>& ranges, unsigned threads) {
  std::size_t total = 0;
  for (const CopyRange& range : ranges) total += range.size_bytes;
  const auto useful = static_cast<unsigned>(std::min<std::size_t>(threads, 1 + total / kThreadMinimumBytes));
  const bool streams = total >= kStreamMinimumBytes;
  if (useful <= 1) {
    copy_share(ranges, streams);
    return;
  }
  const std::vector<std::vector<CopyRange>> shares = divide(ranges, total, useful);
  std::vector<std::thread> helpers;
  helpers.reserve(useful - 1);
  for (std::size_t number = 1; number < shares.size(); ++number) {
    try {
      const SignalsBlocked blocked;
      helpers.emplace_back(copy_share, std::cref(shares[number]), streams);
    } catch (const std::system_error&) {
      copy_share(shares[number], streams);
    }
  }
  copy_share(shares[0], streams);
  for (std::thread& helper : helpers) helper.join();
}

bool copy_twice(const std::vector<CopyRange>& ranges, char* destination, std::size_t size_bytes, char* twin) noexcept {
  char* const end = destination + size_bytes;
  // The last range that begins at or before the destination.
  auto range = std::upper_bound(ranges.begin(), ranges.end(), destination,
                                [](const char* at, const CopyRange& one) { return at < one.destination; });
  if (range != ranges.begin()) --range;
  char* at = destination;
  for (; at < end && range != ranges.end(); ++range) {
    if (range->size_bytes == 0) continue;
    if (at < range->destination || range->destination + range->size_bytes <= at) return false;
    const auto low = static_cast<std::size_t>(at - range->destination);
    const std::size_t size = std::min(range->size_bytes - low, static_cast<std::size_t>(end - at));
    char* const also = twin + (at - destination);
    if (range->source == nullptr) {
      std::memset(at, 0, size);
      std::memset(also, 0, size);
    } else if (size >= kStreamRangeBytes) {
      stream(at, also, range->source + low, size);
    } else {
      copy_cached(at, also, range->source + low, size);
    }
    at += size;
  }
  return at == end;
}

void touch(char* address, std::size_t size_bytes) noexcept {
  if (size_bytes == 0) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(address);
  const std::uintptr_t first = start & ~(page - 1);
#if defined(MADV_POPULATE_WRITE)
  // One call for all pages instead of a fault for each; older kernels refuse it.
  if (madvise(reinterpret_cast<void*>(first), start + size_bytes - first, MADV_POPULATE_WRITE) == 0) return;
#endif
  for (std::uintptr_t at = first; at < start + size_bytes; at += page) {
    __atomic_fetch_or(reinterpret_cast<char*>(std::max(at, start)), 0, __ATOMIC_RELAXED);
  }
}

}  // namespace ciuic
