// Threads that share out the parts of a product or of attention.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <vector>

namespace jaxembed {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that help whoever calls. A call takes the share of the cores that its run of a model has: all of them when that
// is alone, its own when as many runs are under way as there are cores. When it has to wait for a helper, longer than it
// worked itself, then others use that helper's core: for a while there is one core fewer to share. Helpers look out for more
// work for a moment before they sleep, since the parts of one model follow each other closely.
class Crew {
 public:
  // Never destroyed: a helper may still look out when the process ends.
  static Crew& get() {
    static Crew* crew = new Crew;
    return *crew;
  }

  template <class Work> void each(size_t count, bool large, const Work& work) {
    size_t helpers = large && count > 1 ? std::min(share(), count) - 1 : 0;
    if (helpers == 0) {
      for (size_t i = 0; i < count; i++) work(i);
      return;
    }
    Job job(count, helpers, [](const void* data, size_t i) { (*static_cast<const Work*>(data))(i); }, &work);
    auto begun = Clock::now();
    publish(job, helpers);
    job.run();
    auto done = Clock::now();
    withdraw(job);
    auto waited = Clock::now() - done;
    if (waited > LONG && waited > done - begun) lend(done + waited);
  }

  // Cores that each run has.
  size_t share() const {
    return std::max<size_t>(1, (cores_ - lent(Clock::now())) / std::max<size_t>(1, runs_.load(std::memory_order_relaxed)));
  }

  void begin() { runs_++; }
  void end() { runs_--; }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds LONG{300};  // to wait for a helper that is at work: most parts take less
  static constexpr std::chrono::milliseconds WHILE{20};  // that a core is left to others

  struct Job {
    Job(size_t count, size_t places, void (*function)(const void*, size_t), const void* data)
        : count(count), places(places), function(function), data(data) {}
    void run() {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) function(data, i);
    }
    const size_t count;
    size_t places;  // helpers that may still come; with the lock held
    void (*const function)(const void*, size_t);
    const void* const data;
    std::atomic<size_t> next{0}, inside{0};
  };

  Crew() : cores_(std::max(1u, std::thread::hardware_concurrency())) {
    for (size_t i = 1; i < cores_; i++) std::thread([this] { help(); }).detach();
  }

  // Cores that are left to others.
  size_t lent(Clock::time_point now) const {
    bool back = now.time_since_epoch().count() >= back_.load(std::memory_order_relaxed);
    return back ? 0 : lent_.load(std::memory_order_relaxed);
  }

  // Leaves one core more to others for a while from now on.
  void lend(Clock::time_point now) {
    lent_ = std::min(lent(now) + 1, cores_ - 1);
    back_ = (now + WHILE).time_since_epoch().count();
  }

  void publish(Job& job, size_t helpers) {
    bool wake;
    {
      std::lock_guard<std::mutex> held(lock_);
      jobs_.push_back(&job);
      open_ += helpers;
      wake = asleep_ > 0;
    }
    if (wake) helpers > 1 ? called_.notify_all() : called_.notify_one();
  }

  // Returns when nobody is at the job any more.
  void withdraw(Job& job) {
    {
      std::lock_guard<std::mutex> held(lock_);
      jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
      open_ -= job.places;
    }
    for (int turns = 0; job.inside.load(std::memory_order_acquire) > 0; turns++) turns < 4096 ? pause() : (void)sched_yield();
  }

  void help() {
    for (;;) {
      look_out();
      Job* job;
      {
        std::unique_lock<std::mutex> held(lock_);
        asleep_++;
        called_.wait(held, [this] { return open_ > 0; });
        asleep_--;
        job = *std::find_if(jobs_.begin(), jobs_.end(), [](Job* one) { return one->places > 0; });
        job->places--;
        job->inside++;
        open_--;
      }
      job->run();
      job->inside.fetch_sub(1, std::memory_order_release);
    }
  }

  void look_out() {
    auto until = Clock::now() + std::chrono::microseconds(100);
    while (open_.load(std::memory_order_acquire) == 0 && Clock::now() < until) {
      for (int i = 0; i < 16; i++) pause();
    }
  }

  const size_t cores_;
  std::atomic<size_t> runs_{0};
  std::atomic<size_t> lent_{0};      // cores, until
  std::atomic<Clock::rep> back_{0};  // they come back
  std::atomic<size_t> open_{0};  // places for helpers; changed with the lock held
  std::mutex lock_;
  std::condition_variable called_;
  std::vector<Job*> jobs_;  // with the lock held
  size_t asleep_ = 0;       // with the lock held
};

}  // namespace jaxembed
