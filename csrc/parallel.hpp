// Rows shared out over a fixed set of threads, without allocating.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "frame.hpp"

namespace fastpix2pix {

// Pixels that the simplest conversion takes about 0.1 ms for. To wake a thread takes less, but on a virtual machine
// whose cores sleep not much less.
constexpr int kGrain = 1 << 17;

// Used by one caller at a time. With one thread everything runs in the caller, as little work does with more.
class RowPool {
 public:
  // A thread is woken only for `grain` pixels or more.
  RowPool(int threads, int grain) : grain_(grain) {
    try {
      for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { serve(worker); });
    } catch (const std::system_error& error) {
      stop();
      throw Failed(std::string("cannot start a thread for pixels: ") + error.what());
    }
  }
  RowPool(const RowPool&) = delete;
  RowPool& operator=(const RowPool&) = delete;

  ~RowPool() { stop(); }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // body(worker, row) for every row of 0..rows, which read or write so many pixels in all; returns when all are done.
  // body must not throw.
  template <class Body>
  void for_rows(int rows, long long pixels, const Body& body) {
    const int shares = static_cast<int>(std::clamp<long long>(pixels / grain_, 1, threads()));
    const Task task{&body, rows, shares, [](const void* context, int worker, int row) {
                      (*static_cast<const Body*>(context))(worker, row);
                    }};
    if (shares == 1) return run(task, 0);
    {
      std::lock_guard lock(mutex_);
      task_ = task;
      unfinished_ = shares - 1;
      ++generation_;
    }
    wake_.notify_all();
    run(task, 0);
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ == 0; });
  }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  struct Task {
    const void* context = nullptr;
    int rows = 0;
    int shares = 1;  // of the workers 0 .. shares - 1
    void (*call)(const void*, int, int) = nullptr;
  };

  void run(const Task& task, int worker) const {
    const long long rows = task.rows;
    const int begin = static_cast<int>(rows * worker / task.shares);
    const int end = static_cast<int>(rows * (worker + 1) / task.shares);
    for (int row = begin; row < end; ++row) task.call(task.context, worker, row);
  }

  void serve(int worker) {
    unsigned seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      const Task task = task_;
      if (worker >= task.shares) continue;
      lock.unlock();
      run(task, worker);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  const int grain_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Task task_;
  unsigned generation_ = 0;
  int unfinished_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;  // last: they use the others
};

}  // namespace fastpix2pix
