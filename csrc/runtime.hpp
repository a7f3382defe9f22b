// Frames in, translated frames out, through a ring of slots and two threads. The same for every device.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "latency.hpp"
#include "ring.hpp"
#include "spec.hpp"

namespace fastpix2pix {

// Translates the tensor at `input` into the one at `output`, which are those of the slot and stay where they are.
// stream: a cudaStream_t to enqueue on, or null on the CPU, where the work is done on return. May throw.
using Engine = std::function<void(int slot, const void* input, void* output, void* stream)>;

// Keeps foreign device memory alive until the frame in it has been read or given up. Goes on any thread, at times
// under a lock, so its deleter waits for nobody.
using Owner = std::shared_ptr<void>;

struct StageTimes {
  Latency::Duration upload{}, compute{}, download{};
};

// What a device does with one slot. Owns the slots' memory. launch and finish run on one thread each.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Planes staging(int slot) = 0;      // host memory of a source frame
  virtual ConstPlanes result(int slot) = 0;  // host memory of a finished frame
  virtual void stage(int slot) = 0;          // the next launch takes the frame in staging(slot)
  virtual void adopt(int slot, const ConstPlanes& device_frame) = 0;  // the next launch takes that one
  virtual void launch(int slot) = 0;        // begin the work; throws where it cannot be begun, and reads no frame then
  virtual void await_read(int slot) = 0;    // wait until the adopted frame has been read
  virtual StageTimes finish(int slot) = 0;  // wait until result(slot) is whole; throws what went wrong
};

class FrameRuntime {
 public:
  enum class Submitted { accepted, dropped, timed_out };

  struct Shape {
    FrameShape source, target;
    int slots, depth;
    Policy policy;
  };

  FrameRuntime(std::unique_ptr<Backend> backend, const Shape& shape);
  ~FrameRuntime();
  FrameRuntime(const FrameRuntime&) = delete;
  FrameRuntime& operator=(const FrameRuntime&) = delete;

  const Shape& shape() const { return shape_; }

  void check_open() { ring_.check(); }  // raises what every call raises after a failure or close
  // Copy a host frame in; it is the caller's again on return. timed_out: not taken and not counted.
  Submitted submit(const ConstPlanes& frame, std::int64_t tag, Time deadline, Time until);
  // Hand a frame in that lies in the device's memory; `owner` is taken with it.
  Submitted submit_device(const ConstPlanes& frame, Owner& owner, std::int64_t tag, Time deadline, Time until);
  // Copy the next frame out and give its tag; nothing at `until`, or once finish was called and all is out.
  std::optional<std::int64_t> collect(const Planes& frame, Time until);

  void finish() { ring_.finish(); }
  bool drained() { return ring_.drained(); }
  // Stop: frames inside are abandoned, work on the device is waited for. May be called twice.
  void close();

  Counters counters() { return ring_.counters(); }

  enum Stage { queue, upload, compute, download, total, kStages };
  static constexpr const char* kStageNames[kStages] = {"queue", "upload", "compute", "download", "total"};
  std::array<Latency, kStages> latency();

 private:
  template <class Fill>
  Submitted submit_with(const Fill& fill, std::int64_t tag, Time deadline, Time until);
  void let_go(int slot) { owners_[static_cast<std::size_t>(slot)].reset(); }
  void launch_frames();
  void finish_frames();

  Shape shape_;
  Ring ring_;
  std::unique_ptr<Backend> backend_;
  std::vector<Time> launched_;  // per slot; written before it is launched, read after
  std::vector<Owner> owners_;   // per slot; whoever holds the slot may touch its own
  std::mutex latency_mutex_;
  std::array<Latency, kStages> latency_;
  std::mutex close_mutex_;
  std::thread launcher_, finisher_;  // they use all of the others; close joins them
};

void copy_planes(const Planes& to, const ConstPlanes& from, const FrameShape& shape);

}  // namespace fastpix2pix
