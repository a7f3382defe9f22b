// Letting go of the GIL, also while the interpreter ends, and of objects without it.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace fastpix2pix::python {

namespace py = pybind11;

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

// Objects that threads without the GIL are done with: they put them here instead of waiting for it.
class Done {
 public:
  using Objects = std::vector<py::object>;

  Done() = default;
  ~Done() {
    const py::gil_scoped_acquire acquire;
    objects_.clear();
  }
  Done(const Done&) = delete;
  Done& operator=(const Done&) = delete;

  void add(Objects objects) {
    const std::lock_guard lock(mutex_);
    objects_.push_back(std::move(objects));
  }
  void let_go() {  // with the GIL
    std::vector<Objects> objects;
    const std::lock_guard lock(mutex_);
    objects.swap(objects_);
  }

 private:
  std::mutex mutex_;
  std::vector<Objects> objects_;
};

}  // namespace fastpix2pix::python
