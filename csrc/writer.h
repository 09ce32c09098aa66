// Writes one new file from a thread of its own, past the page cache where the file system allows it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ciuic {

// A write that failed, as errno. The file is then of no use: nothing is retried.
struct WriteError {
  int number;
};

// Appends to an empty file, from offset 0.
//
// Ownership: borrows `fd` and all that is lent, which must stay until finish, abort or the destructor returns; never
// closes the file, never syncs it, and leaves it without O_DIRECT. Owns its buffers (at most queue_depth of
// buffer_size_bytes) and one thread.
// Threads: calls may come from any thread; they run one after the other.
// Failure: the first error is kept. append and finish throw it, now and later; what was appended may be on disk in part.
// Fork: in a forked child (a data loader's worker) the object is dead: abort and the destructor do nothing there, the
// other calls throw std::logic_error.
class DirectWriter {
 public:
  // buffer_size_bytes: a multiple of 4096. niceness: of the thread; lower than the caller's is not attempted.
  // Throws std::invalid_argument, std::bad_alloc, std::system_error (no thread).
  DirectWriter(int fd, std::size_t buffer_size_bytes, unsigned queue_depth, int niceness);
  ~DirectWriter();
  DirectWriter(const DirectWriter&) = delete;
  DirectWriter& operator=(const DirectWriter&) = delete;

  // Copies the bytes and returns; waits only while all buffers are in flight. Throws WriteError, std::bad_alloc, and
  // std::logic_error after finish or abort.
  void append(const void* data, std::size_t size_bytes);

  // Like append, without a copy where direct writes allow it: from whole blocks of memory at whole blocks of the file.
  // The bytes must stay as they are until drain, finish, abort or the destructor returns.
  void lend(const void* data, std::size_t size_bytes);

  // Returns when nothing that was lent is needed any more. Throws WriteError.
  void drain();

  // Writes the rest, ends the thread, cuts preallocated space. Returns the length of the file. Once.
  std::uint64_t finish();

  // Drops what is not yet written and ends the thread. Idempotent; does nothing after finish.
  void abort() noexcept;

  // How many bytes were written past the page cache so far.
  std::uint64_t direct_bytes() const noexcept;

  // How long the thread has been writing, waiting for work not counted.
  double busy_s() const noexcept;

 private:
  struct State;
  State* state_;
};

}  // namespace ciuic
