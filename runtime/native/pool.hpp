// A pool of threads that outlives its jobs: at 16 threads and a few milliseconds a job, starting them would show.

#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace slidetune {

// Blocks of work, handed out one by one.
struct Job {
  const std::function<void(int64_t)>& body;
  const int64_t blocks;
  std::atomic<int64_t> next{0};

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) body(i);
  }
};

// A job that everything waits for, while other threads have all the cores: they take blocks of it between two of their
// own. To wake threads of its own is no help then: the system lets who runs run on, for milliseconds.
class Urgent {
 public:
  void post(Job* job) { job_ = job; }

  // Returns when nobody works on it any more.
  void withdraw() {
    job_ = nullptr;
    while (helping_ != 0) std::this_thread::yield();
  }

  void help() {
    if (job_.load(std::memory_order_relaxed) == nullptr) return;
    // In this order: who withdraws the job either is seen here or waits.
    ++helping_;
    if (Job* job = job_) job->take();
    --helping_;
  }

 private:
  std::atomic<Job*> job_{nullptr};
  std::atomic<int> helping_{0};
};

class Pool {
 public:
  // Calls body(0) ... body(blocks - 1), each once, on this thread and threads - 1 others. Returns when all are done.
  // Blocks are handed out one by one, so a thread that the system holds up does not hold up the rest.
  // One job at a time: a second caller waits. `urgent`: where others may find the job and help.
  void run(int threads, int64_t blocks, const std::function<void(int64_t)>& body, Urgent* urgent = nullptr) {
    std::lock_guard<std::mutex> one_job(jobs_);
    Job job{body, blocks};
    if (urgent != nullptr) urgent->post(&job);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start(threads - 1);
      job_ = &job;
      wanted_ = threads - 1;
      ++generation_;
    }
    if (threads > 1) wake_.notify_all();
    job.take();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // A worker that has not come yet finds no job; only those inside are waited for.
      job_ = nullptr;
    }
    poll([&] { return inside_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return inside_ == 0; });
    lock.unlock();
    if (urgent != nullptr) urgent->withdraw();
  }

 private:
  // Where the system has no more threads, those there are do the work.
  void start(int workers) {
    try {
      for (; started_ < workers; ++started_) std::thread(&Pool::work, this, started_).detach();
    } catch (const std::system_error&) {
    }
  }

  // Waits for a moment without sleeping: the next job often follows in microseconds, and to wake a thread takes longer.
  template <typename Ready>
  static void poll(const Ready& ready) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    while (!ready() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      poll([&] { return generation_ != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* job = job_;
      if (job == nullptr || index >= wanted_) continue;
      ++inside_;
      lock.unlock();
      job->take();
      lock.lock();
      if (--inside_ == 0) done_.notify_one();
    }
  }

  std::mutex jobs_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  std::atomic<uint64_t> generation_{0};
  int started_ = 0;
  int wanted_ = 0;
  std::atomic<int> inside_{0};
};

// The process's pools. Never destroyed: their threads sleep when the process ends.
struct Pools {
  Pool* adam = new Pool;
  // Embedding rows: they move little, and would wait behind a whole chunk of Adam, whose threads help them instead.
  Pool* rows = new Pool;
  Urgent* urgent = new Urgent;

  void run_rows(int threads, int64_t blocks, const std::function<void(int64_t)>& body) {
    rows->run(threads, blocks, body, urgent);
  }

  static Pools& shared() {
    static std::once_flag once;
    std::call_once(once, [] {
      shared_ = new Pools;
      // A forked child has none of the threads, and locks in any state: it gets pools of its own.
      pthread_atfork(nullptr, nullptr, [] { shared_ = new Pools; });
    });
    return *shared_;
  }

 private:
  static inline Pools* shared_ = nullptr;
};

}  // namespace slidetune
