// writer.h: the file holds what was appended, in order, from however many threads; errors and ends are clean.
#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>

#include <fcntl.h>

#include "../writer.h"
#include "checks.h"

namespace {

constexpr std::size_t kBlock = 4096;

// A file in the folder where the test runs: on a real disk, where direct writes are possible.
class File {
 public:
  File() {
    std::string name = "native-test-XXXXXX";
    fd_ = mkstemp(name.data());
    CHECK(fd_ >= 0);
    CHECK(unlink(name.c_str()) == 0);
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  Bytes content() const {
    const auto size = lseek(fd_, 0, SEEK_END);
    CHECK(size >= 0);
    Bytes found(static_cast<std::size_t>(size));
    std::size_t at = 0;
    while (at < found.size()) {
      const ssize_t count = pread(fd_, found.data() + at, found.size() - at, static_cast<off_t>(at));
      CHECK(count > 0);
      at += static_cast<std::size_t>(count);
    }
    return found;
  }

 private:
  int fd_;
};


// Appended and lent by turns, in sizes from 0 to several buffers.
void one_thread(std::size_t buffer_bytes, unsigned depth, unsigned seed) {
  Source source(seed);
  const Guarded lent(source.bytes(64 * kBlock));
  const File file;
  Bytes expected;
  ciuic::DirectWriter writer(file.fd(), buffer_bytes, depth, 19);
  const auto add = [&](const std::uint8_t* from, std::size_t size, bool lends) {
    lends ? writer.lend(from, size) : writer.append(from, size);
    expected.insert(expected.end(), from, from + size);
  };
  for (int round = 0; round < 60; ++round) {
    const std::size_t blocks = source.below(40) * kBlock;
    switch (source.below(5)) {
      case 0:
        add(lent.data(), source.below(lent.size()), false);
        break;
      case 1:
        add(lent.data() + blocks, lent.size() - blocks, true);
        break;
      case 2:
        add(lent.data(), source.below(lent.size()), true);
        break;
      case 3: {  // up to a whole block, so that what follows can be lent
        const std::size_t rest = (kBlock - expected.size() % kBlock) % kBlock;
        add(lent.data(), rest, false);
        add(lent.data() + blocks, lent.size() - blocks, true);
        break;
      }
      default: {
        const Bytes passing = source.bytes(source.below(3 * buffer_bytes));
        add(passing.data(), passing.size(), false);
        writer.drain();
      }
    }
  }
  CHECK(writer.finish() == expected.size());
  CHECK(writer.finish() == expected.size());
  CHECK(writer.direct_bytes() <= expected.size());
  CHECK(file.content() == expected);
  CHECK_THROWS(std::logic_error, writer.append("x", 1));
  writer.abort();
}

struct Line {
  std::uint32_t thread;
  std::uint32_t number;
  std::uint32_t size_bytes;
};

// Every thread's records are there, whole and in its order.
void several_threads() {
  constexpr std::uint32_t kThreads = 4, kRecords = 200;
  const File file;
  std::atomic<bool> done{false};
  ciuic::DirectWriter writer(file.fd(), 16 * kBlock, 3, 0);
  std::thread watcher([&] {
    while (!done.load()) {
      CHECK(writer.busy_s() >= 0);
      static_cast<void>(writer.direct_bytes());
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> threads;
  for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&writer, thread] {
      Source source(thread);
      for (std::uint32_t number = 0; number < kRecords; ++number) {
        const auto size = static_cast<std::uint32_t>(source.below(9000));
        Bytes record(sizeof(Line) + size, static_cast<std::uint8_t>(thread + number));
        const Line line{thread, number, size};
        std::memcpy(record.data(), &line, sizeof(line));
        if (number % 3 == 0) {
          writer.lend(record.data(), record.size());
          writer.drain();
        } else {
          writer.append(record.data(), record.size());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::uint64_t size = writer.finish();
  done = true;
  watcher.join();
  const Bytes content = file.content();
  CHECK(content.size() == size);
  std::uint32_t next[kThreads] = {};
  for (std::size_t at = 0; at < content.size();) {
    Line line{};
    CHECK(at + sizeof(line) <= content.size());
    std::memcpy(&line, content.data() + at, sizeof(line));
    CHECK(line.thread < kThreads && line.number == next[line.thread]++);
    at += sizeof(line);
    CHECK(at + line.size_bytes <= content.size());
    for (std::size_t byte = 0; byte < line.size_bytes; ++byte) {
      CHECK(content[at + byte] == static_cast<std::uint8_t>(line.thread + line.number));
    }
    at += line.size_bytes;
  }
  for (const std::uint32_t count : next) CHECK(count == kRecords);
}

// One thread gives up while others append: they are told, and nothing is left behind.
void given_up_halfway() {
  const File file;
  ciuic::DirectWriter writer(file.fd(), 4 * kBlock, 2, 0);
  std::atomic<int> told{0};
  std::atomic<int> appended{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&] {
      const Bytes data(3 * kBlock + 5, 1);
      try {
        for (;;) {
          writer.append(data.data(), data.size());
          ++appended;
        }
      } catch (const std::logic_error&) {
        ++told;
      }
    });
  }
  while (appended < 10) std::this_thread::yield();
  writer.abort();
  for (std::thread& thread : threads) thread.join();
  CHECK(told == 3);
  CHECK_THROWS(std::logic_error, writer.finish());
  CHECK_THROWS(std::logic_error, writer.drain());
}

void errors() {
  const Bytes data(100000, 1);
  const auto full = std::tuple("/dev/full", O_WRONLY, ENOSPC);
  const auto only_read = std::tuple("/dev/zero", O_RDONLY, EBADF);
  for (const auto& [path, flags, number] : {full, only_read}) {
    const int fd = open(path, flags | O_CLOEXEC);
    CHECK(fd >= 0);
    {
      ciuic::DirectWriter writer(fd, 4 * kBlock, 2, 0);
      int found = 0;
      try {
        for (int round = 0; round < 100; ++round) writer.append(data.data(), data.size());
        writer.drain();
      } catch (const ciuic::WriteError& error) {
        found = error.number;
      }
      CHECK(found == number);
      CHECK_THROWS(ciuic::WriteError, writer.append(data.data(), 1));
      CHECK_THROWS(ciuic::WriteError, writer.finish());
      CHECK_THROWS(ciuic::WriteError, writer.finish());
    }
    close(fd);
  }
  const File file;
  CHECK_THROWS(std::invalid_argument, ciuic::DirectWriter(file.fd(), 0, 2, 0));
  CHECK_THROWS(std::invalid_argument, ciuic::DirectWriter(file.fd(), kBlock + 1, 2, 0));
  CHECK_THROWS(std::invalid_argument, ciuic::DirectWriter(file.fd(), kBlock, 0, 0));
  CHECK_THROWS(std::invalid_argument, ciuic::DirectWriter(file.fd(), kBlock, 1025, 0));
  { const ciuic::DirectWriter unused(file.fd(), kBlock, 1, 0); }
  {
    ciuic::DirectWriter dropped(file.fd(), kBlock, 1, 0);
    dropped.append(data.data(), data.size());
  }
  const File empty;
  ciuic::DirectWriter none(empty.fd(), kBlock, 1, 0);
  CHECK(none.finish() == 0);
  CHECK(empty.content().empty());
}

}  // namespace

void test_writer() {
  unsigned seed = 30;
  for (const std::size_t buffer_bytes : {kBlock, 16 * kBlock, std::size_t{1} << 20}) {
    for (const unsigned depth : {1U, 2U, 5U}) one_thread(buffer_bytes, depth, ++seed);
  }
  several_threads();
  given_up_halfway();
  errors();
}
