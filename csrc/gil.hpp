// Letting go of the GIL, also while the interpreter ends.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace fastpix2pix::python {

// The GIL is free for others as long as this lives. Python kills a thread that asks an interpreter that ends for it, in
// the middle of its C++ frames: after `last_thread` all others sleep for ever instead, as daemon threads do.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    ++asking_;
    const std::thread::id last = last_;
    if (last != std::thread::id() && last != std::this_thread::get_id()) {
      --asking_;
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
    PyEval_RestoreThread(state_);
    --asking_;
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Called without the GIL by the thread that ends the interpreter. Whoever asks for the GIL by now gets it first; a
  // process forked meanwhile has none of these threads, so that is not waited for without end.
  static void last_thread() {
    last_ = std::this_thread::get_id();
    for (int ms = 0; asking_ > 0 && ms < 1000; ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  inline static std::atomic<std::thread::id> last_{};
  inline static std::atomic<int> asking_{0};

  PyThreadState* state_;
};

}  // namespace fastpix2pix::python
