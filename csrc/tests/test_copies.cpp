// copy.h: every byte arrives, none beside it changes, whatever the sizes, alignments and threads.
#include <algorithm>
#include <atomic>
#include <thread>

#include "../copy.h"
#include "checks.h"

namespace {

constexpr std::size_t kSizes[] = {0, 1, 2, 63, 64, 65, 127, 4095, 4096, 4097, 70001, (256 << 10) + 3, (3 << 20) + 17};

void copies_of_one_range() {
  Source source(1);
  for (const std::size_t size : kSizes) {
    for (const std::size_t shift : {0U, 1U, 31U, 64U}) {
      const Bytes content = source.bytes(size);
      const Guarded from(content);
      Guarded to(size + shift);
      std::memset(to.data(), 0xAA, to.size());
      ciuic::copy_stream(to.chars() + shift, from.chars(), size);
      CHECK(size == 0 || std::memcmp(to.data() + shift, content.data(), size) == 0);
      CHECK(std::count(to.data(), to.data() + shift, 0xAA) == static_cast<std::ptrdiff_t>(shift));
    }
  }
}

// Ranges of odd sizes one behind the other, with untouched bytes between them; some have no source.
void copies_of_many(unsigned threads, std::size_t largest) {
  Source source(threads);
  const Bytes content = source.bytes(6 << 20);
  const Guarded from(content);
  Guarded to(content.size() + (1 << 16));
  std::memset(to.data(), 0xAA, to.size());
  Bytes expected(to.size(), 0xAA);
  std::vector<ciuic::CopyRange> ranges;
  for (std::size_t at = 0;;) {
    const std::size_t size = source.below(largest);
    const std::size_t gap = source.below(70);
    if (at + size + gap > content.size()) break;
    const bool zeros = source.below(4) == 0;
    const std::size_t there = source.below(content.size() - size);
    ranges.push_back({to.chars() + at, zeros ? nullptr : from.chars() + there, size});
    for (std::size_t byte = 0; byte < size; ++byte) {
      expected[at + byte] = zeros ? std::uint8_t{0} : content[there + byte];
    }
    at += size + gap;
  }
  ciuic::copy_many(ranges, threads);
  CHECK(to.holds(expected));
}

void copies_made_twice() {
  Source source(3);
  const Bytes content = source.bytes(300000);
  const Guarded from(content);
  Guarded to(content.size());
  std::vector<ciuic::CopyRange> ranges;
  Bytes expected = content;
  for (std::size_t at = 0; at < content.size();) {
    const std::size_t wanted = source.below(3) == 0 ? source.below(9000) : source.below(200);
    const std::size_t size = std::min(content.size() - at, wanted);
    const bool zeros = source.below(5) == 0;
    ranges.push_back({to.chars() + at, zeros ? nullptr : from.chars() + at, size});
    if (zeros) std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(at), size, std::uint8_t{0});
    at += size;
  }
  for (int round = 0; round < 300 / kFewer; ++round) {
    const std::size_t at = source.below(content.size());
    const std::size_t size = source.below(std::min<std::size_t>(content.size() - at, 50000) + 1);
    Guarded twin(size);
    CHECK(ciuic::copy_twice(ranges, to.chars() + at, size, twin.chars()));
    CHECK(size == 0 || std::memcmp(to.data() + at, expected.data() + at, size) == 0);
    CHECK(size == 0 || std::memcmp(twin.data(), expected.data() + at, size) == 0);
  }
  Guarded twin(100);
  CHECK(!ciuic::copy_twice(ranges, to.chars() + content.size() - 50, 100, twin.chars()));  // beyond the last range
  const std::vector<ciuic::CopyRange> hole = {{to.chars(), from.chars(), 40}, {to.chars() + 41, from.chars(), 100}};
  CHECK(!ciuic::copy_twice(hole, to.chars(), 100, twin.chars()));
  CHECK(!ciuic::copy_twice({}, to.chars(), 1, twin.chars()));
  CHECK(ciuic::copy_twice({}, to.chars(), 0, twin.chars()));
}

// Touching changes nothing, neither in what is there nor in what somebody else is writing.
void touching() {
  Source source(4);
  const Bytes content = source.bytes(50001);
  const Guarded memory(content);
  ciuic::touch(memory.chars(), memory.size());
  ciuic::touch(memory.chars() + 3, 0);
  ciuic::touch(memory.chars() + 3, 4097);
  CHECK(memory.holds(content));

  constexpr std::size_t kWords = 64 << 10;
  const std::size_t size = kWords * sizeof(std::atomic<std::uint64_t>);
  const Guarded shared(size);
  auto* const words = reinterpret_cast<std::atomic<std::uint64_t>*>(shared.data());
  std::thread writer([words] {
    for (std::size_t word = 0; word < kWords; ++word) words[word].store(word, std::memory_order_relaxed);
  });
  ciuic::touch(shared.chars(), size);
  writer.join();
  for (std::size_t word = 0; word < kWords; ++word) CHECK(words[word].load(std::memory_order_relaxed) == word);
}

}  // namespace

void test_copies() {
  copies_of_one_range();
  for (const unsigned threads : {1U, 2U, 3U, 7U}) {
    copies_of_many(threads, 3000);
    copies_of_many(threads, 2 << 20);
  }
  copies_of_many(100, 100);
  ciuic::copy_many({}, 4);
  copies_made_twice();
  touching();
}
