// What the native core's own tests share: a check that ends the program, memory with a guard behind it, random numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition)                                                                        \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);              \
      std::abort();                                                                             \
    }                                                                                           \
  } while (false)

// Whether `call` throws an `Error`.
#define CHECK_THROWS(Error, call) \
  do {                            \
    bool thrown = false;          \
    try {                         \
      call;                       \
    } catch (const Error&) {      \
      thrown = true;              \
    }                             \
    CHECK(thrown);                \
  } while (false)

// The thread sanitizer looks for races and is slow: what one thread does alone is tried less often there.
#if defined(__SANITIZE_THREAD__)
constexpr int kFewer = 20;
#else
constexpr int kFewer = 1;
#endif

using Bytes = std::vector<std::uint8_t>;

// Memory that ends at a page nobody may touch: code that no sanitizer looks into, such as libzstd, faults there.
class Guarded {
 public:
  explicit Guarded(std::size_t size_bytes) : size_bytes_(size_bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = (size_bytes + page - 1) / page * page + page;
    void* const memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<std::uint8_t*>(memory);
    CHECK(mprotect(mapped_ + mapped_bytes_ - page, page, PROT_NONE) == 0);
    data_ = mapped_ + mapped_bytes_ - page - size_bytes;
  }
  explicit Guarded(const Bytes& content) : Guarded(content.size()) {
    if (!content.empty()) std::memcpy(data_, content.data(), content.size());
  }
  ~Guarded() { munmap(mapped_, mapped_bytes_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::uint8_t* data() const { return data_; }
  char* chars() const { return reinterpret_cast<char*>(data_); }
  std::size_t size() const { return size_bytes_; }
  bool holds(const Bytes& content) const {
    return content.size() == size_bytes_ && (content.empty() || std::memcmp(data_, content.data(), size_bytes_) == 0);
  }

 private:
  std::size_t size_bytes_;
  std::size_t mapped_bytes_;
  std::uint8_t* mapped_;
  std::uint8_t* data_;
};

// The same numbers on every machine.
class Source {
 public:
  explicit Source(unsigned seed) : engine_(seed) {}
  // Below `end`, which is not 0.
  std::size_t below(std::size_t end) {
    CHECK(end > 0);
    return static_cast<std::size_t>(engine_() % end);
  }
  Bytes bytes(std::size_t size_bytes) {
    Bytes made(size_bytes);
    for (std::uint8_t& byte : made) byte = static_cast<std::uint8_t>(engine_());
    return made;
  }

 private:
  std::mt19937_64 engine_;
};

// The parts of the test, each in a file of its own.
void test_copies();
void test_planes();
void test_codecs();
void test_writer();
