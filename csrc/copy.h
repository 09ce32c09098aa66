// Copying between memory that somebody else owns. Nothing here allocates or keeps the bytes it is shown.
#pragma once

#include <cstddef>
#include <vector>

namespace ciuic {

// One copy; without a source the destination is filled with zeros. Source and destination do not overlap, and both stay
// valid and unmoved until the call returns.
struct CopyRange {
  char* destination;
  const char* source;
  std::size_t size_bytes;
};

// Copies one range on the calling thread, past the caches if it is big. Stores are fenced: another thread may read when
// it returns.
void copy_stream(char* destination, const char* source, std::size_t size_bytes) noexcept;

// Copies all ranges on up to `threads` threads, the caller among them; all are joined before it returns. Work is
// split evenly by bytes, at cache lines of the destination. Where a thread cannot be started, the caller copies its
// share. Destinations must not overlap each other. Throws std::bad_alloc before the first byte, or nothing.
//
// Copies that are big together bypass the caches (non-temporal stores), because nobody reads a staged copy soon and
// training wants its caches. Stores are fenced: another thread may read when it returns.
void copy_many(const std::vector<CopyRange>& ranges, unsigned threads);

// Copies what `ranges` hold for `size_bytes` from `destination` on, past the caches, and the very same bytes into `twin`,
// which stays in them for whoever reads them at once. On the calling thread. `ranges` are sorted by destination and do
// not overlap; `twin` overlaps nothing. False, with the bytes undefined, where `ranges` leave a gap.
bool copy_twice(const std::vector<CopyRange>& ranges, char* destination, std::size_t size_bytes, char* twin) noexcept;

// Makes every page of the range present and writable, without changing a byte even while others write to it. First
// touch costs more than copying: do it once, ahead of time.
void touch(char* address, std::size_t size_bytes) noexcept;

}  // namespace ciuic
