#include "runtime.hpp"

#include <cstring>
#include <exception>
#include <string>
#include <system_error>
#include <utility>

namespace fastpix2pix {

void copy_planes(const Planes& to, const ConstPlanes& from, const FrameShape& shape) {
  for (int p = 0; p < plane_count(shape.format); ++p) {
    const std::ptrdiff_t width = plane_width(shape, p), rows = plane_rows(shape, p);
    if (to.stride[p] == width && from.stride[p] == width) {
      std::memcpy(to.data[p], from.data[p], static_cast<std::size_t>(width * rows));
      continue;
    }
    for (std::ptrdiff_t y = 0; y < rows; ++y) {
      std::memcpy(to.data[p] + y * to.stride[p], from.data[p] + y * from.stride[p], static_cast<std::size_t>(width));
    }
  }
}

FrameRuntime::FrameRuntime(std::unique_ptr<Backend> backend, const Shape& shape)
    : shape_(shape),
      ring_(shape.slots, shape.policy, shape.depth, [this](int slot) { let_go(slot); }),
      backend_(std::move(backend)),
      launched_(static_cast<std::size_t>(shape.slots)),
      owners_(static_cast<std::size_t>(shape.slots)) {
  try {
    launcher_ = std::thread([this] { launch_frames(); });
    finisher_ = std::thread([this] { finish_frames(); });
  } catch (const std::system_error& error) {
    close();
    throw Failed(std::string("cannot start a thread of the frame runtime: ") + error.what());
  }
}

FrameRuntime::~FrameRuntime() { close(); }

void FrameRuntime::close() {
  ring_.stop();
  std::lock_guard lock(close_mutex_);
  if (launcher_.joinable()) launcher_.join();
  if (finisher_.joinable()) finisher_.join();
}

template <class Fill>
FrameRuntime::Submitted FrameRuntime::submit_with(const Fill& fill, std::int64_t tag, Time deadline, Time until) {
  const Ring::Acquired got = ring_.acquire(until);
  if (got.taken == Ring::Taken::timed_out) return Submitted::timed_out;
  if (got.taken == Ring::Taken::refused) return Submitted::dropped;
  try {
    fill(got.slot);
  } catch (...) {
    ring_.give_back(got.slot);
    throw;
  }
  ring_.publish(got.slot, tag, deadline);
  return Submitted::accepted;
}

FrameRuntime::Submitted FrameRuntime::submit(const ConstPlanes& frame, std::int64_t tag, Time deadline, Time until) {
  const auto fill = [&](int slot) {
    copy_planes(backend_->staging(slot), frame, shape_.source);
    backend_->stage(slot);
  };
  return submit_with(fill, tag, deadline, until);
}

FrameRuntime::Submitted FrameRuntime::submit_device(const ConstPlanes& frame, Owner& owner, std::int64_t tag,
                                                    Time deadline, Time until) {
  const auto fill = [&](int slot) {
    backend_->adopt(slot, frame);
    owners_[static_cast<std::size_t>(slot)] = std::move(owner);
  };
  return submit_with(fill, tag, deadline, until);
}

std::optional<std::int64_t> FrameRuntime::collect(const Planes& frame, Time until) {
  const std::optional<Ring::Result> result = ring_.take(until);
  if (!result) return std::nullopt;
  copy_planes(frame, backend_->result(result->slot), shape_.target);
  ring_.release(result->slot);
  return result->tag;
}

std::array<Latency, FrameRuntime::kStages> FrameRuntime::latency() {
  std::lock_guard lock(latency_mutex_);
  return latency_;
}

void FrameRuntime::launch_frames() {
  int slot;
  while ((slot = ring_.next_to_launch()) >= 0) {
    launched_[static_cast<std::size_t>(slot)] = Clock::now();
    try {
      backend_->launch(slot);
      ring_.launched(slot);
    } catch (const std::exception& error) {
      ring_.fail(slot, error.what());
    }
  }
}

void FrameRuntime::finish_frames() {
  int slot;
  while ((slot = ring_.next_to_finish()) >= 0) {
    try {
      backend_->await_read(slot);
      let_go(slot);
      const StageTimes times = backend_->finish(slot);
      const Time begun = launched_[static_cast<std::size_t>(slot)], in = ring_.published(slot);
      {
        std::lock_guard lock(latency_mutex_);
        latency_[queue].add(begun - in);
        latency_[upload].add(times.upload);
        latency_[compute].add(times.compute);
        latency_[download].add(times.download);
        latency_[total].add(Clock::now() - in);
      }
      ring_.finished(slot);
    } catch (const std::exception& error) {
      ring_.fail(slot, error.what());
    }
  }
}

}  // namespace fastpix2pix
