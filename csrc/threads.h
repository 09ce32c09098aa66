// What every thread of the native core has in common.
#pragma once

#include <csignal>
#include <pthread.h>

namespace ciuic {

// Blocks all signals on this thread while it lives. Threads inherit the mask of their creator: a thread started inside
// this scope never runs a signal handler of the program, and no handler is touched.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace ciuic
