#include "writer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "copy.h"
#include "segment_format.h"
#include "threads.h"

namespace ciuic {
namespace {

constexpr std::uint64_t kPreallocateBytes = std::uint64_t{64} << 20;  // ahead of the writes: fewer, larger extents
constexpr std::uint64_t kScarceBytes = std::uint64_t{1} << 30;         // less is free: others need what we would only hold
constexpr std::size_t kPreallocateMinimumBytes = std::size_t{1} << 20;  // a file that ends here needs no room ahead
constexpr std::size_t kLendMinimumBytes = std::size_t{64} << 10;       // below, a copy is cheaper than one more vector
constexpr std::size_t kBatchBytes = std::size_t{9} << 20;              // one system call, two chunks: enough for a deep queue
constexpr std::size_t kBatchPieces = 64;                               // likewise; far below IOV_MAX
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

// Filled from the front; what is handed over to the thread stays until the thread has written it.
struct Buffer {
  char* memory = nullptr;
  std::size_t used = 0;
  std::size_t handed = 0;
  unsigned in_flight = 0;  // pieces with the thread; guarded by the mutex
  bool retired = false;    // nothing more is put in: free once in_flight is 0; likewise
};

// Consecutive bytes of the file. `buffer` is null for what is lent.
struct Piece {
  const char* data;
  std::size_t size_bytes;
  Buffer* buffer;
};

bool is_aligned(std::uint64_t value) { return value % kDirectAlignmentBytes == 0; }

}  // namespace

struct DirectWriter::State {
  const int fd;
  const std::size_t buffer_size_bytes;
  const unsigned queue_depth;
  const int niceness;
  const pid_t owner = getpid();

  std::mutex calls;  // one call at a time; guards `current`, `position`, `finished`, `ended`
  Buffer* current = nullptr;
  std::uint64_t position = 0;  // length of all that was appended
  bool finished = false;
  bool ended = false;

  std::mutex mutex;  // guards the block below
  std::condition_variable changed;
  std::deque<Piece> queue;
  std::vector<Buffer*> free;
  std::vector<std::unique_ptr<Buffer>> buffers;
  bool writing = false;
  bool closing = false;
  bool dropping = false;
  int error = 0;

  std::atomic<std::uint64_t> direct_bytes{0};
  std::atomic<std::uint64_t> busy_ns{0};
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
    // Lowest of the best-effort class, where the disk's scheduler knows classes: training's own reads come first.
    constexpr int kProcess = 1;
    constexpr int kBestEffortLowest = (2 << 13) | 7;
    static_cast<void>(syscall(SYS_ioprio_set, kProcess, 0, kBestEffortLowest));
    set_direct(true);
    Piece batch[kBatchPieces];
    for (;;) {
      std::size_t count = 0;
      bool skip = false;
      {
        std::unique_lock<std::mutex> hold(mutex);
        changed.wait(hold, [this] { return closing || !queue.empty(); });
        if (queue.empty()) break;
        std::size_t bytes = 0;
        while (count < kBatchPieces && !queue.empty() && (count == 0 || bytes + queue.front().size_bytes <= kBatchBytes)) {
          bytes += queue.front().size_bytes;
          batch[count++] = queue.front();
          queue.pop_front();
        }
        writing = true;
        skip = dropping || error != 0;
      }
      const int failed = skip ? 0 : write_timed(batch, count);
      const std::lock_guard<std::mutex> hold(mutex);
      writing = false;
      for (std::size_t number = 0; number < count; ++number) {
        Buffer* const buffer = batch[number].buffer;
        if (buffer != nullptr && --buffer->in_flight == 0 && buffer->retired) free.push_back(buffer);  // room was reserved
      }
      if (error == 0) error = failed;
      changed.notify_all();
    }
    set_direct(false);  // leave the flags as they were
  }

  int write_timed(const Piece* pieces, std::size_t count) noexcept {
    const auto begin = std::chrono::steady_clock::now();
    const int failed = write_out(pieces, count);
    const auto time = std::chrono::steady_clock::now() - begin;
    busy_ns += static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
    return failed;
  }

  // 0 or errno.
  int write_out(const Piece* pieces, std::size_t count) noexcept {
    iovec vectors[kBatchPieces];
    std::size_t rest = 0;
    for (std::size_t number = 0; number < count; ++number) {
      vectors[number] = {const_cast<char*>(pieces[number].data), pieces[number].size_bytes};
      rest += pieces[number].size_bytes;
    }
    preallocate(rest);
    std::size_t first = 0;  // vector that is not wholly written
    while (rest > 0) {
      // Direct writes are whole blocks: what is left over, and what follows a short write, goes the usual way.
      std::size_t last = count;
      std::size_t cut = 0;  // bytes of the last vector that are left for later
      if (direct) {
        if (!is_aligned(offset) || rest < kDirectAlignmentBytes) {
          set_direct(false);
          continue;
        }
        cut = rest % kDirectAlignmentBytes;  // only the last piece of a file is no whole number of blocks
        if (cut >= vectors[last - 1].iov_len) {
          set_direct(false);
          continue;
        }
      }
      vectors[last - 1].iov_len -= cut;
      const ssize_t written = pwritev(fd, vectors + first, static_cast<int>(last - first), static_cast<off_t>(offset));
      const int failure = errno;
      vectors[last - 1].iov_len += cut;
      if (written < 0) {
        if (failure == EINTR) continue;
        if (failure == EINVAL && direct) {  // some file systems accept the flag and refuse the write
          set_direct(false);
          continue;
        }
        return failure;
      }
      if (written == 0) return EIO;
      offset += static_cast<std::uint64_t>(written);
      rest -= static_cast<std::size_t>(written);
      if (direct) direct_bytes += static_cast<std::uint64_t>(written);
      for (auto left = static_cast<std::size_t>(written); left > 0;) {
        const std::size_t step = std::min(left, vectors[first].iov_len);
        vectors[first].iov_base = static_cast<char*>(vectors[first].iov_base) + step;
        vectors[first].iov_len -= step;
        left -= step;
        if (vectors[first].iov_len == 0) ++first;
      }
    }
    return 0;
  }

  // Room for what is written next, and where there is plenty for more. Advice: an error here, a full disk included, shows
  // in the write itself. The length of the file stays.
  void preallocate(std::size_t upcoming) noexcept {
    const std::uint64_t needed = offset + upcoming;
    if (!direct || needed <= preallocated || upcoming < kPreallocateMinimumBytes) return;
    preallocated = needed + (is_plenty_free() ? kPreallocateBytes : 0);
    const int failed = fallocate(fd, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(preallocated - offset));
    if (failed != 0 && (errno == ENOSPC || errno == EDQUOT)) {
      // What it got before the disk was full is ours until we give it back.
      static_cast<void>(!ftruncate(fd, static_cast<off_t>(offset)));
    }
  }

  bool is_plenty_free() const noexcept {
    struct statvfs status;
    return fstatvfs(fd, &status) == 0 && status.f_bavail >= kScarceBytes / std::max<unsigned long>(status.f_frsize, 1);
  }

  void set_direct(bool wanted) noexcept {
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0) return;
    const int target = wanted ? flags | O_DIRECT : flags & ~O_DIRECT;
    const bool done = target == flags || fcntl(fd, F_SETFL, target) == 0;
    direct = wanted && done;
  }

  // --- the callers, who hold `calls` ---

  // Gives the thread what was put into the current buffer since the last time.
  // The mutex is held.
  void queue_current() {
    Buffer& buffer = *current;
    if (buffer.used == buffer.handed) return;
    queue.push_back({buffer.memory + buffer.handed, buffer.used - buffer.handed, &buffer});
    ++buffer.in_flight;
    buffer.handed = buffer.used;
  }

  // The current buffer is full, or the last.
  void retire_current() {
    const std::lock_guard<std::mutex> hold(mutex);
    queue_current();
    current->retired = true;
    if (current->in_flight == 0) free.push_back(current);
    current = nullptr;
    changed.notify_all();
  }

  void take_buffer() {
    std::unique_lock<std::mutex> hold(mutex);
    if (free.empty() && buffers.size() < queue_depth) {
      auto fresh = std::make_unique<Buffer>();
      fresh->memory = pool().take(buffer_size_bytes);
      current = fresh.get();
      buffers.push_back(std::move(fresh));  // room was reserved
      return;
    }
    changed.wait(hold, [this] { return !free.empty(); });
    current = free.back();
    free.pop_back();
    current->used = current->handed = 0;
    current->retired = false;
  }

  void copy_in(const char* from, std::size_t size_bytes) {
    while (size_bytes > 0) {
      if (current == nullptr) {
        take_buffer();
        if (const int failed = first_error()) throw WriteError{failed};
      }
      const std::size_t count = std::min(size_bytes, buffer_size_bytes - current->used);
      copy_stream(current->memory + current->used, from, count);
      current->used += count;
      position += count;
      from += count;
      size_bytes -= count;
      if (current->used == buffer_size_bytes) retire_current();
    }
  }

  void check_open() {
    if (const int failed = first_error()) throw WriteError{failed};
    if (ended) throw std::logic_error("a call after the end of a writer");
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
    current = nullptr;
    free.clear();
    for (const auto& buffer : buffers) pool().give(buffer->memory, buffer_size_bytes);
    buffers.clear();
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
    state_->buffers.reserve(queue_depth);
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
  state.check_open();
  state.copy_in(static_cast<const char*>(data), size_bytes);
}

void DirectWriter::lend(const void* data, std::size_t size_bytes) {
  State& state = *state_;
  if (!state.is_mine()) throw std::logic_error("writer of another process");
  const std::lock_guard<std::mutex> hold(state.calls);
  state.check_open();
  const char* const from = static_cast<const char*>(data);
  const std::size_t blocks = size_bytes & ~(kDirectAlignmentBytes - 1);
  const bool whole = is_aligned(state.position) && is_aligned(reinterpret_cast<std::uintptr_t>(from));
  if (!whole || blocks < kLendMinimumBytes) {
    state.copy_in(from, size_bytes);
    return;
  }
  {
    const std::lock_guard<std::mutex> queue_hold(state.mutex);
    if (state.current != nullptr) state.queue_current();
    state.queue.push_back({from, blocks, nullptr});
    state.changed.notify_all();  // once for both: they become one system call
  }
  state.position += blocks;
  state.copy_in(from + blocks, size_bytes - blocks);
}

void DirectWriter::drain() {
  State& state = *state_;
  if (!state.is_mine()) throw std::logic_error("writer of another process");
  const std::lock_guard<std::mutex> hold(state.calls);
  state.check_open();
  std::unique_lock<std::mutex> queue_hold(state.mutex);
  state.changed.wait(queue_hold, [&state] { return state.queue.empty() && !state.writing; });
  if (state.error != 0) throw WriteError{state.error};
}

std::uint64_t DirectWriter::finish() {
  State& state = *state_;
  if (!state.is_mine()) throw std::logic_error("writer of another process");
  const std::lock_guard<std::mutex> hold(state.calls);
  if (!state.ended) {
    if (state.current != nullptr) state.retire_current();
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

double DirectWriter::busy_s() const noexcept { return static_cast<double>(state_->busy_ns) * 1e-9; }

}  // namespace ciuic
