// Who may touch which slot, in which order, and what is dropped when there are too many frames. Knows no pixels.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "frame.hpp"

namespace fastpix2pix {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
constexpr Time kNever = Time::max();

// What submit does while every slot is taken: wait, give the oldest frame up that no stage is working on, or refuse.
enum class Policy { block, drop_oldest, drop_newest };

// submitted = collected + dropped_oldest + dropped_newest + late + failed + abandoned + pending, at any time.
struct Counters {
  std::uint64_t submitted = 0;  // frames handed in, refused ones included
  std::uint64_t collected = 0;
  std::uint64_t dropped_oldest = 0;
  std::uint64_t dropped_newest = 0;
  std::uint64_t late = 0;       // past their deadline before they were begun
  std::uint64_t failed = 0;     // in work when the engine failed
  std::uint64_t abandoned = 0;  // still inside at close or at a failure
  std::uint64_t pending = 0;    // inside now
};

// A slot goes free -> filling -> queued -> launching -> launched -> done -> reading -> free. Each step has one method;
// the holder of a slot in "filling", "launching" and "reading" touches its memory without a lock. Frames come out in
// the order in which they were published. Any number of threads may submit and collect; one launches, one finishes.
class Ring {
 public:
  enum class Taken { slot, refused, timed_out };
  struct Acquired {
    Taken taken;
    int slot;
  };
  struct Result {
    int slot;
    std::int64_t tag;
  };

  // depth: slots that may be launched at once. Frames that are launched can no longer be dropped.
  // left(slot): its frame has left, collected or not, and no other is in it yet. Called under the ring's lock.
  Ring(int slots, Policy policy, int depth, std::function<void(int)> left = {})
      : slots_(slots), policy_(policy), depth_(depth), left_(std::move(left)) {
    if (slots < 2 || slots > 64) {
      throw InvalidInput("slots = " + std::to_string(slots) + "; allowed are 2 to 64");
    }
    if (depth < 1 || depth > slots) {
      throw InvalidInput("depth = " + std::to_string(depth) + "; allowed are 1 to slots = " + std::to_string(slots));
    }
  }

  // ---- the one who submits
  Acquired acquire(Time until) {
    std::unique_lock lock(mutex_);
    while (true) {
      check_open();
      if (finishing_) throw InvalidInput("submit after finish: the end of the stream was announced");
      int slot = oldest([](State s) { return s == State::free; });
      if (slot < 0 && policy_ == Policy::drop_newest) {
        ++counters_.submitted;
        ++counters_.dropped_newest;
        return {Taken::refused, -1};
      }
      if (slot < 0 && policy_ == Policy::drop_oldest) {
        slot = oldest([](State s) { return s == State::queued || s == State::done; });
        if (slot >= 0) {
          ++counters_.dropped_oldest;
          leave(slot);
        }
      }
      if (slot >= 0) {
        slots_[slot].state = State::filling;
        return {Taken::slot, slot};
      }
      if (!wait(room_, lock, until)) return {Taken::timed_out, -1};
    }
  }

  void publish(int slot, std::int64_t tag, Time deadline) {
    std::lock_guard lock(mutex_);
    Slot& s = slots_[slot];
    s.tag = tag;
    s.deadline = deadline;
    s.published = Clock::now();
    s.sequence = next_++;
    ++counters_.submitted;
    s.state = State::queued;
    if (stopping_) abandon(slot);
    queued_.notify_all();
    if (policy_ == Policy::drop_oldest) room_.notify_all();  // it may be dropped at once
  }

  void give_back(int slot) {  // acquired, but could not be filled
    std::lock_guard lock(mutex_);
    free_locked(slot);
  }

  // ---- the one who launches: the next slot in time, or -1 to stop
  int next_to_launch() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      const int slot = oldest([](State s) { return s == State::queued; });
      if (slot >= 0 && Clock::now() > slots_[slot].deadline) {
        ++counters_.late;
        free_locked(slot);
      } else if (slot >= 0 && in_work() < depth_) {
        slots_[slot].state = State::launching;
        return slot;
      } else {
        queued_.wait(lock);
      }
    }
    launching_ended_ = true;
    launched_.notify_all();
    return -1;
  }
  void launched(int slot) {
    std::lock_guard lock(mutex_);
    slots_[slot].state = State::launched;
    launched_.notify_all();
  }
  Time published(int slot) {
    std::lock_guard lock(mutex_);
    return slots_[slot].published;
  }

  // ---- the one who finishes: the oldest launched slot, or -1 once launching has ended and nothing is in work
  int next_to_finish() {
    std::unique_lock lock(mutex_);
    while (true) {
      const int slot = oldest([](State s) { return s == State::launched; });
      if (slot >= 0) return slot;
      if (launching_ended_) return -1;
      launched_.wait(lock);
    }
  }
  void finished(int slot) {
    std::lock_guard lock(mutex_);
    slots_[slot].state = State::done;
    if (stopping_) abandon(slot);
    done_.notify_all();
    queued_.notify_all();                                    // one less in work
    if (policy_ == Policy::drop_oldest) room_.notify_all();  // it may be dropped
  }

  // ---- the one who collects: nothing at `until`, or once the stream has ended and all is out
  std::optional<Result> take(Time until) {
    std::unique_lock lock(mutex_);
    while (true) {
      check_open();
      const int slot = oldest([](State s) { return s == State::done; });
      if (slot >= 0) {
        slots_[slot].state = State::reading;
        return Result{slot, slots_[slot].tag};
      }
      if (finishing_ && empty()) return std::nullopt;
      if (!wait(done_, lock, until)) return std::nullopt;
    }
  }
  void release(int slot) {
    std::lock_guard lock(mutex_);
    ++counters_.collected;
    free_locked(slot);
  }

  // ---- everyone
  void check() {  // raises once it has failed or was stopped
    std::lock_guard lock(mutex_);
    check_open();
  }
  void finish() {  // no more frames will come
    std::lock_guard lock(mutex_);
    finishing_ = true;
    room_.notify_all();
    done_.notify_all();
  }

  // True once finish was called and every frame has been collected, dropped or found late.
  bool drained() {
    std::lock_guard lock(mutex_);
    return finishing_ && empty();
  }

  void stop() {
    std::lock_guard lock(mutex_);
    stop_locked();
  }

  // A slot in work failed: every call from now on raises `message`.
  void fail(int slot, const std::string& message) {
    std::lock_guard lock(mutex_);
    if (error_.empty()) error_ = message;
    leave(slot);
    ++counters_.failed;
    stop_locked();
  }

  Counters counters() {
    std::lock_guard lock(mutex_);
    Counters now = counters_;
    now.pending = count_inside();
    return now;
  }

 private:
  enum class State { free, filling, queued, launching, launched, done, reading };
  struct Slot {
    State state = State::free;
    std::uint64_t sequence = 0;
    std::int64_t tag = 0;
    Time published, deadline;
  };

  // The slot of the lowest sequence number whose state is wanted, or -1.
  template <class Wanted>
  int oldest(const Wanted& wanted) const {
    int best = -1;
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
      if (wanted(slots_[i].state) && (best < 0 || slots_[i].sequence < slots_[best].sequence)) best = i;
    }
    return best;
  }

  template <class Wanted>
  int count(const Wanted& wanted) const {
    int n = 0;
    for (const Slot& slot : slots_) n += wanted(slot.state);
    return n;
  }
  int in_work() const {
    return count([](State s) { return s == State::launching || s == State::launched; });
  }
  int count_inside() const {
    return count([](State s) { return s != State::free && s != State::filling; });
  }
  // A slot in "filling" may still become a frame: finish may be called while another thread submits.
  bool empty() const {
    return count([](State s) { return s != State::free; }) == 0;
  }

  void leave(int slot) {
    slots_[slot].state = State::free;
    if (left_) left_(slot);
  }
  void abandon(int slot) {
    leave(slot);
    ++counters_.abandoned;
  }

  void free_locked(int slot) {
    leave(slot);
    room_.notify_all();
    if (finishing_) done_.notify_all();  // it may have been the last
  }

  void stop_locked() {
    stopping_ = true;
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
      if (slots_[i].state == State::queued || slots_[i].state == State::done) abandon(i);
    }
    for (std::condition_variable* waiting : {&room_, &queued_, &launched_, &done_}) waiting->notify_all();
  }

  void check_open() const {
    if (!error_.empty()) throw Failed(error_);
    if (stopping_) throw Failed("the frame runtime is closed; make a new one");
  }

  // False once it is too late; otherwise something may have changed.
  static bool wait(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Time until) {
    if (until == kNever) {
      changed.wait(lock);
      return true;
    }
    return changed.wait_until(lock, until) == std::cv_status::no_timeout || Clock::now() < until;
  }

  std::mutex mutex_;
  // Who waits: for a slot, to launch, to finish, to collect. With one for all, each step would wake everybody.
  std::condition_variable room_, queued_, launched_, done_;
  std::vector<Slot> slots_;
  Policy policy_;
  int depth_;
  std::function<void(int)> left_;
  std::uint64_t next_ = 0;
  Counters counters_;
  std::string error_;
  bool finishing_ = false, stopping_ = false, launching_ended_ = false;
};

}  // namespace fastpix2pix
