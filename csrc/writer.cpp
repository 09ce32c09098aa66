#include "writer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "copy.h"
#include "segment_format.h"
#include "threads.h"

namespace ciuic {
namespace {

constexpr std::uint64_t kPreallocateBytes = std::uint64_t{64} << 20;  // ahead of the writes: fewer, larger extents
constexpr std::size_t kIdleBytes = std::size_t{16} << 20;             // kept for the next file: fresh memory is slow

// Page-aligned buffers of finished writers, for the next one.
class BufferPool {
 public:
  char* take(std::size_t size_bytes) {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      for (auto found = idle_.begin(); found != idle_.end(); ++found) {
        if (found->size_bytes == size_bytes) {
          char* const memory = found->memory;
          idle_bytes_ -= size_bytes;
          idle_.erase(found);
          return memory;
        }
      }
    }
    void* const memory = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }

  void give(char* memory, std::size_t size_bytes) noexcept {
    const std::lock_guard<std::mutex> hold(mutex_);
    if (idle_bytes_ + size_bytes <= kIdleBytes) {
      try {
        idle_.push_back({memory, size_bytes});
        idle_bytes_ += size_bytes;
        return;
      } catch (const std::bad_alloc&) {
        // Not worth an error: unmapped below.
      }
    }
    munmap(memory, size_bytes);
  }

 private:
  struct Idle {
    char* memory;
    std::size_t size_bytes;
  };

  std::mutex mutex_;  // guards all below
  std::vector<Idle> idle_;
  std::size_t idle_bytes_ = 0;
};

BufferPool& pool() {
  static BufferPool* const one = new BufferPool;  // never destroyed: writers may outlive static objects
  return *one;
}

struct Filled {
  char* memory;
  std::size_t size_bytes;
};

bool is_aligned(std::uint64_t value) { return value % kDirectAlignmentBytes == 0; }

}  // namespace

struct DirectWriter::State {
  const int fd;
  const std::size_t buffer_size_bytes;
  const unsigned queue_depth;
  const int niceness;
  const pid_t owner = getpid();

  std::mutex calls;  // one call at a time; guards `current`, `finished`, `ended`
  Filled current{nullptr, 0};
  bool finished = false;
  bool ended = false;

  std::mutex mutex;  // guards the block below
  std::condition_variable changed;
  std::deque<Filled> queue;
  std::vector<char*> free;
  unsigned allocated = 0;
  bool closing = false;
  bool dropping = false;
  int error = 0;

  std::atomic<std::uint64_t> direct_bytes{0};
  bool direct = false;             // of the thread
  std::uint64_t offset = 0;        // of the thread; of the caller once it is joined
  std::uint64_t preallocated = 0;  // likewise
  std::thread thread;

  State(int file, std::size_t size, unsigned depth, int nice)
      : fd(file), buffer_size_bytes(size), queue_depth(depth), niceness(nice) {}

  bool is_mine() const noexcept { return owner == getpid(); }

  // --- the thread ---

  void run() noexcept {
    pthread_setname_np(pthread_self(), "ciuic-writer");
    const auto id = static_cast<id_t>(syscall(SYS_gettid));
    if (getpriority(PRIO_PROCESS, id) < niceness) setpriority(PRIO_PROCESS, id, niceness);
    set_direct(true);
    for (;;) {
      Filled next{nullptr, 0};
      bool skip = false;
      {
        std::unique_lock<std::mutex> hold(mutex);
        changed.wait(hold, [this] { return closing || !queue.empty(); });
        if (queue.empty()) break;
        next = queue.front();
        queue.pop_front();
        skip = dropping || error != 0;
      }
      const int failed = skip ? 0 : write_out(next);
      const std::lock_guard<std::mutex> hold(mutex);
      free.push_back(next.memory);  // room was reserved
      if (error == 0) error = failed;
      changed.notify_all();
    }
    set_direct(false);  // leave the flags as they were
  }

  // 0 or errno.
  int write_out(const Filled& filled) noexcept {
    preallocate(filled.size_bytes);
    const char* from = filled.memory;
    std::size_t rest = filled.size_bytes;
    while (rest > 0) {
      std::size_t count = rest;
      if (direct) {
        // Direct writes are whole blocks: what is left over, and what follows a short write, goes the usual way.
        count &= ~(kDirectAlignmentBytes - 1);
        if (count == 0 || !is_aligned(offset)) {
          set_direct(false);
          continue;
        }
      }
      const ssize_t written = pwrite(fd, from, count, static_cast<off_t>(offset));
      if (written < 0) {
        if (errno == EINTR) continue;
        if (errno == EINVAL && direct) {  // some file systems accept the flag and refuse the write
          set_direct(false);
          continue;
        }
        return errno;
      }
      if (written == 0) return EIO;
      from += written;
      rest -= static_cast<std::size_t>(written);
      offset += static_cast<std::uint64_t>(written);
      if (direct) direct_bytes += static_cast<std::uint64_t>(written);
    }
    return 0;
  }

  // Advice: an error here, a full disk included, shows in the write itself.
  void preallocate(std::size_t upcoming) noexcept {
    if (!direct || offset + upcoming <= preallocated || upcoming < buffer_size_bytes) return;
    preallocated = std::max(preallocated, offset) + kPreallocateBytes;
    static_cast<void>(fallocate(fd, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                                static_cast<off_t>(preallocated - offset)));
  }

  void set_direct(bool wanted) noexcept {
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0) return;
    const int target = wanted ? flags | O_DIRECT : flags & ~O_DIRECT;
    const bool done = target == flags || fcntl(fd, F_SETFL, target) == 0;
    direct = wanted && done;
  }

  // --- the callers, who hold `calls` ---

  void hand_over() {
    const std::lock_guard<std::mutex> hold(mutex);
    queue.push_back(current);
    current = {nullptr, 0};
    changed.notify_all();
  }

  void take_buffer() {
    std::unique_lock<std::mutex> hold(mutex);
    if (free.empty() && allocated < queue_depth) {
      current = {pool().take(buffer_size_bytes), 0};
      ++allocated;
      return;
    }
    changed.wait(hold, [this] { return !free.empty(); });
    current = {free.back(), 0};
    free.pop_back();
  }

  int first_error() {
    const std::lock_guard<std::mutex> hold(mutex);
    return error;
  }

  void end_thread(bool drop) noexcept {
    {
      const std::lock_guard<std::mutex> hold(mutex);
      closing = true;
      dropping = drop;
      changed.notify_all();
    }
    thread.join();
    ended = true;
    if (current.memory != nullptr) pool().give(current.memory, buffer_size_bytes);
    current = {nullptr, 0};
    for (char* memory : free) pool().give(memory, buffer_size_bytes);
    free.clear();
  }
};

DirectWriter::DirectWriter(int fd, std::size_t buffer_size_bytes, unsigned queue_depth, int niceness) {
  if (buffer_size_bytes == 0 || !is_aligned(buffer_size_bytes)) {
    throw std::invalid_argument("buffer size is not a positive multiple of 4096 bytes");
  }
  if (queue_depth == 0 || queue_depth > 1024) throw std::invalid_argument("queue depth is not in 1..1024");
  state_ = new State(fd, buffer_size_bytes, queue_depth, niceness);
  try {
    state_->free.reserve(queue_depth);
    const SignalsBlocked blocked;
    state_->thread = std::thread([state = state_] { state->run(); });
  } catch (...) {
    delete state_;
    throw;
  }
}

DirectWriter::~DirectWriter() {
  if (!state_->is_mine()) {
    // The thread did not survive the fork, and locks may be held by it forever: leave everything alone.
    state_->thread.detach();
    return;
  }
  abort();
  delete state_;
}

void DirectWriter::append(const void* data, std::size_t size_bytes) {
  State& state = *state_;
  if (!state.is_mine()) throw std::logic_error("writer of another process");
  const std::lock_guard<std::mutex> hold(state.calls);
  if (const int error = state.first_error()) throw WriteError{error};
  if (state.ended) throw std::logic_error("append after the end of a writer");
  const char* from = static_cast<const char*>(data);
  while (size_bytes > 0) {
    if (state.current.memory == nullptr) {
      state.take_buffer();
      if (const int error = state.first_error()) throw WriteError{error};
    }
    Filled& current = state.current;
    const std::size_t count = std::min(size_bytes, state.buffer_size_bytes - current.size_bytes);
    copy_stream(current.memory + current.size_bytes, from, count);
    current.size_bytes += count;
    from += count;
    size_bytes -= count;
    if (current.size_bytes == state.buffer_size_bytes) state.hand_over();
  }
}

std::uint64_t DirectWriter::finish() {
  State& state = *state_;
  if (!state.is_mine()) throw std::logic_error("writer of another process");
  const std::lock_guard<std::mutex> hold(state.calls);
  if (!state.ended) {
    if (state.current.memory != nullptr) state.hand_over();
    state.end_thread(false);
    state.finished = true;
    // Also gives back blocks preallocated beyond the end.
    if (state.error == 0 && ftruncate(state.fd, static_cast<off_t>(state.offset)) != 0) state.error = errno;
  }
  if (state.error != 0) throw WriteError{state.error};
  if (!state.finished) throw std::logic_error("finish after abort");
  return state.offset;
}

void DirectWriter::abort() noexcept {
  if (!state_->is_mine()) return;
  const std::lock_guard<std::mutex> hold(state_->calls);
  if (!state_->ended) state_->end_thread(true);
}

std::uint64_t DirectWriter::direct_bytes() const noexcept { return state_->direct_bytes; }

}  // namespace ciuic
