#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"
#include "cpus.h"
#include "pool.h"
#include "runtime.h"

using namespace fluxion;

namespace {

// Counts how often each part ran.
class CountingJob : public Job {
 public:
  CountingJob(Pool* pool, int64_t parts) : left(parts), runs(parts), pool_(pool) {
    for (auto& count : runs) count = 0;
  }
  void run(int64_t first, int64_t last) noexcept override {
    for (int64_t part = first; part < last; ++part) ++runs[part];
    Pool* pool = pool_;
    if (left.fetch_sub(last - first) == last - first) pool->notify_done();
  }
  bool each_once() const {
    for (const auto& count : runs) {
      if (count != 1) return false;
    }
    return left == 0;
  }
  std::atomic<int64_t> left;
  std::vector<std::atomic<int>> runs;

 private:
  Pool* pool_;
};

// Blocks the worker that runs it until it is opened.
class Gate : public Job {
 public:
  void run(int64_t, int64_t) noexcept override {
    entered = true;
    while (!open) std::this_thread::yield();
    left = 0;
  }
  std::atomic<bool> entered{false};
  std::atomic<bool> open{false};
  std::atomic<int64_t> left{1};
};

const Clock::time_point kNever = Clock::time_point::max();

}  // namespace

TEST(pool_runs_every_part_once_with_any_number_of_threads) {
  for (const int threads : {1, 2, 5}) {
    Pool pool(threads);
    for (int round = 0; round < 50; ++round) {
      CountingJob first(&pool, 7);
      CountingJob second(&pool, 1);
      pool.push(&first, 7);
      pool.push(&second, 1);
      CHECK(pool.help(second.left, kNever));
      CHECK(pool.help(first.left, kNever));
      CHECK(first.each_once());
      CHECK(second.each_once());
    }
  }
}

TEST(pool_without_workers_runs_nothing_by_itself) {
  Pool pool(1);
  CountingJob job(&pool, 2);
  pool.push(&job, 2);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK_EQ(job.left.load(), 2);
  CHECK(pool.run_some());
  CHECK(!pool.run_some());
  CHECK(job.each_once());
}

TEST(pool_workers_run_without_a_helper) {
  Pool pool(2);
  CountingJob job(&pool, 3);
  pool.push(&job, 3);
  const Clock::time_point end = Clock::now() + std::chrono::seconds(20);
  while (job.left > 0 && Clock::now() < end) std::this_thread::yield();
  CHECK(job.each_once());
}

TEST(help_gives_up_at_the_deadline) {
  Pool pool(2);
  Gate gate;
  pool.push(&gate, 1);
  while (!gate.entered) std::this_thread::yield();
  CHECK(!pool.help(gate.left, Clock::now() + std::chrono::milliseconds(30)));
  gate.open = true;
  CHECK(pool.help(gate.left, kNever));
}

TEST(a_sleeping_helper_wakes_for_new_work) {
  Pool pool(1);
  CountingJob job(&pool, 1);
  std::thread helper([&] { CHECK(pool.help(job.left, kNever)); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  pool.push(&job, 1);
  helper.join();
  CHECK(job.each_once());
}

TEST(changing_the_number_of_threads_loses_no_work) {
  Pool pool(3);
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    for (int threads = 1; !stop; threads = threads % 4 + 1) pool.set_threads(threads);
  });
  for (int round = 0; round < 200; ++round) {
    CountingJob job(&pool, 5);
    pool.push(&job, 5);
    CHECK(pool.help(job.left, kNever));
    CHECK(job.each_once());
  }
  stop = true;
  changer.join();
}

TEST(changing_the_number_of_workers_leaves_no_work_without_one) {
  Offer offer;
  Pool pool(3);
  std::atomic<bool> stop{false};
  std::thread changer([&] {
    for (int threads = 2; !stop; threads = 5 - threads) pool.set_threads(threads);
  });
  for (int round = 0; round < 400; ++round) {
    CountingJob job(&pool, 5);
    if (round % 2 == 0) {
      pool.push(&job, 5);
    } else {
      offer.clear(1);
      offer.add(&job, 5);
      pool.push_all(&offer);
    }
    // Nobody helps.
    const Clock::time_point end = Clock::now() + std::chrono::seconds(20);
    while (job.left > 0 && Clock::now() < end) std::this_thread::yield();
    CHECK(job.each_once());
    CHECK(pool.help(job.left, kNever));
  }
  stop = true;
  changer.join();
}

TEST(taking_the_last_worker_away_runs_what_is_queued) {
  Pool pool(2);
  Gate gates[2];
  for (Gate& gate : gates) pool.push(&gate, 1);
  for (Gate& gate : gates) {
    while (!gate.entered) std::this_thread::yield();
  }
  CountingJob job(&pool, 3);
  pool.push(&job, 3);
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    for (Gate& gate : gates) gate.open = true;
  });
  pool.set_threads(1);
  opener.join();
  CHECK(job.each_once());
}

TEST(a_part_may_push_and_help) {
  // Each part of the outer job waits for a job of its own, down to the depth of the pool's work.
  class Nested : public CountingJob {
   public:
    explicit Nested(Pool* pool) : CountingJob(pool, 6), pool_(pool) {}
    void run(int64_t first, int64_t last) noexcept override {
      CountingJob inner(pool_, 3);
      pool_->push(&inner, 3);
      CHECK(pool_->help(inner.left, kNever));
      CHECK(inner.each_once());
      CountingJob::run(first, last);
    }

   private:
    Pool* pool_;
  };
  for (const int threads : {1, 2, 4}) {
    Pool pool(threads);
    for (int round = 0; round < 20; ++round) {
      Nested job(&pool);
      pool.push(&job, 6);
      CHECK(pool.help(job.left, kNever));
      CHECK(job.each_once());
    }
  }
}

TEST(sleeping_workers_wake_for_every_push) {
  // Without spinning all of them sleep between the rounds, so each round is a chain of wake-ups.
  Pool pool(4, {}, Clock::duration::zero());
  for (int round = 0; round < 200; ++round) {
    CountingJob jobs[2] = {{&pool, 1 + round % 5}, {&pool, 1}};
    for (CountingJob& job : jobs) pool.push(&job, static_cast<int64_t>(job.runs.size()));
    if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const Clock::time_point end = Clock::now() + std::chrono::seconds(20);
    while (jobs[0].left + jobs[1].left > 0 && Clock::now() < end) std::this_thread::yield();
    for (CountingJob& job : jobs) CHECK(pool.help(job.left, kNever));
    CHECK(jobs[0].each_once() && jobs[1].each_once());
  }
}

TEST(pool_parts_of_one_job_run_on_all_threads_at_once) {
  // Asleep or spinning: each part goes on only when all have begun, on a thread of its own.
  class Meeting : public Job {
   public:
    explicit Meeting(int64_t parts) : left(parts), parts_(parts) {}
    void run(int64_t first, int64_t last) noexcept override {
      begun += last - first;
      const Clock::time_point end = Clock::now() + std::chrono::seconds(20);
      while (begun < parts_ && Clock::now() < end) std::this_thread::yield();
      met = met && begun == parts_;
      left -= last - first;
    }
    std::atomic<int64_t> begun{0};
    std::atomic<int64_t> left;
    std::atomic<bool> met{true};

   private:
    const int64_t parts_;
  };
  for (const auto spin : {Clock::duration::zero(), kDefaultSpin}) {
    Pool pool(6, {}, spin);
    for (int round = 0; round < 20; ++round) {
      std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
      // The caller's thread is the seventh.
      Meeting job(7);
      pool.push(&job, 7);
      CHECK(pool.help(job.left, kNever));
      CHECK(job.met);
    }
  }
}

TEST(pool_workers_keep_to_their_cpus_and_leave_signals_alone) {
  class Look : public Job {
   public:
    void run(int64_t, int64_t) noexcept override {
      cpus = allowed_cpus();
      sigset_t blocked;
      pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
      blocks_interrupt = sigismember(&blocked, SIGINT) == 1;
      blocks_fault = sigismember(&blocked, SIGSEGV) == 1;
      left = 0;
    }
    std::vector<int> cpus;
    bool blocks_interrupt = false;
    bool blocks_fault = true;
    std::atomic<int64_t> left{1};
  };
  const std::vector<int> last = {allowed_cpus().back()};
  Pool pool(2, last);
  Look look;
  pool.push(&look, 1);
  while (look.left > 0) std::this_thread::yield();
  CHECK(look.cpus == last);
  CHECK(look.blocks_interrupt);
  CHECK(!look.blocks_fault);
  sigset_t mine;
  pthread_sigmask(SIG_SETMASK, nullptr, &mine);
  CHECK(sigismember(&mine, SIGINT) == 0);
}

TEST(a_worker_cannot_replace_the_workers) {
  class Replacing : public Job {
   public:
    explicit Replacing(Pool* pool) : pool_(pool) {}
    void run(int64_t, int64_t) noexcept override {
      try {
        pool_->set_threads(3);
      } catch (const std::logic_error&) {
        refused = true;
      }
      left = 0;
    }
    std::atomic<bool> refused{false};
    std::atomic<int64_t> left{1};

   private:
    Pool* const pool_;
  };
  Pool pool(2);
  Replacing job(&pool);
  pool.push(&job, 1);
  while (job.left > 0) std::this_thread::yield();
  CHECK(job.refused);
  CHECK_EQ(pool.threads(), 2);
  pool.set_threads(3);
  CHECK_EQ(pool.threads(), 3);
}

TEST(no_more_threads_than_a_control_group_keeps_busy) {
  char folder[] = "/tmp/fluxion-quota-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  const std::string root = folder;
  const auto write = [&](const std::string& name, const char* text) {
    std::ofstream(root + name) << text;
  };
  const auto quota = [&] { return cpu_quota(folder, (root + "/membership").c_str()); };
  const long none = std::numeric_limits<long>::max();
  CHECK_EQ(quota(), none);
  write("/membership", "1:name=systemd:/x\n0::/above/own\n");
  CHECK_EQ(mkdir((root + "/above").c_str(), 0700), 0);
  CHECK_EQ(mkdir((root + "/above/own").c_str(), 0700), 0);
  CHECK_EQ(mkdir((root + "/cpu").c_str(), 0700), 0);
  write("/above/own/cpu.max", "max 100000\n");
  CHECK_EQ(quota(), none);
  write("/above/cpu.max", "350000 100000\n");
  CHECK_EQ(quota(), 4L);
  write("/above/own/cpu.max", "50000 100000\n");
  CHECK_EQ(quota(), 1L);
  write("/membership", "0::/\n");
  CHECK_EQ(quota(), none);
  write("/cpu/cpu.cfs_quota_us", "-1\n");
  write("/cpu/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(quota(), none);
  write("/cpu/cpu.cfs_quota_us", "200000\n");
  CHECK_EQ(quota(), 2L);
  std::filesystem::remove_all(root);
}

TEST(cpu_lists_are_read_and_written) {
  const std::vector<int> some = {0, 1, 2, 5, 8, 9};
  CHECK(parse_cpus("8-9,0-2,5,1") == some);
  CHECK_EQ(format_cpus(some), std::string("0-2,5,8-9"));
  CHECK_EQ(format_cpus({7}), std::string("7"));
  for (const char* wrong : {"", ",", "1,", "-1", "1-", "2-1", "1 ", "a", "99999999999999999999"}) {
    CHECK(parse_cpus(wrong).empty());
  }
}

TEST(a_forked_child_has_a_working_pool) {
  runtime().pool.set_threads(3);
  CountingJob before(&runtime().pool, 4);
  runtime().pool.push(&before, 4);
  CHECK(runtime().pool.help(before.left, kNever));
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    setenv("FLUXION_NUM_THREADS", "2", 1);
    CountingJob job(&runtime().pool, 4);
    runtime().pool.push(&job, 4);
    // Not helping: the child must have a worker of its own.
    while (job.left > 0) std::this_thread::yield();
    // Runs the exit handlers, which must not wait for threads of the parent.
    std::exit(job.each_once() ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}

TEST(pool_begins_what_is_next_before_what_was_queued) {
  Pool pool(1);
  // Without workers each job runs when the caller helps, in the order of the queue.
  struct Noting : Job {
    Noting(std::vector<int>* all, int mine) : order(all), name(mine) {}
    void run(int64_t, int64_t) noexcept override { order->push_back(name); }
    std::vector<int>* order;
    int name;
  };
  std::vector<int> order;
  order.reserve(8);
  Noting first(&order, 1), second(&order, 2), urgent(&order, 3), more_urgent(&order, 4);
  pool.push(&first, 2);
  pool.push(&second, 1);
  pool.push(&urgent, 1, Turn::kNext);
  pool.push(&more_urgent, 1, Turn::kNext);
  while (pool.run_some()) {
  }
  CHECK(order == (std::vector<int>{4, 3, 1, 2}));
  // Also on an empty queue, behind which others go.
  pool.push(&urgent, 1, Turn::kNext);
  pool.push(&first, 1);
  while (pool.run_some()) {
  }
  CHECK(order == (std::vector<int>{4, 3, 1, 2, 3, 1}));
}

TEST(pool_takes_shares_of_a_job_and_of_jobs_that_were_pushed_together) {
  struct Noting : Job {
    explicit Noting(std::vector<std::pair<int64_t, int64_t>>* all) : runs(all) {}
    void run(int64_t first, int64_t last) noexcept override { runs->emplace_back(first, last); }
    std::vector<std::pair<int64_t, int64_t>>* runs;
  };
  using Runs = std::vector<std::pair<int64_t, int64_t>>;
  Offer offer, second;
  Pool pool(2);
  // Its workers are held, so that this thread runs all that is queued.
  Gate gates[2];
  for (Gate& gate : gates) pool.push(&gate, 1);
  for (Gate& gate : gates) {
    while (!gate.entered) std::this_thread::yield();
  }
  Runs of_one, urgent_runs, of_many;
  Noting one(&of_one), urgent(&urgent_runs);
  pool.push(&one, 16);
  CHECK(pool.run_some());
  CHECK_EQ(pool.queued(), 12);
  // What goes before it leaves it where it was.
  pool.push(&urgent, 1, Turn::kNext);
  CHECK(pool.run_some());
  CHECK(urgent_runs == (Runs{{0, 1}}));
  CHECK(pool.run_some());
  CHECK(of_one == (Runs{{0, 4}, {4, 7}}));
  while (pool.run_some()) {
  }
  CHECK_EQ(of_one.back().second, 16);
  Noting many[2] = {Noting(&of_many), Noting(&of_many)};
  offer.clear(2);
  for (Noting& job : many) offer.add(&job, 24);
  pool.push_all(&offer);
  // A round is two thirds of what is left, one share for each thread, whatever jobs it is of.
  CHECK_EQ(pool.queued(), 8);
  CHECK(pool.run_some());
  CHECK_EQ(pool.queued(), 7);
  CHECK(of_many == (Runs{{0, 16}}));
  // The jobs of a second offer are queued, and begun behind the first.
  Runs of_other;
  Noting other(&of_other);
  second.clear(1);
  second.add(&other, 3);
  pool.push_all(&second);
  CHECK_EQ(pool.queued(), 10);
  while (pool.queued() > 3) CHECK(pool.run_some());
  CHECK(of_other.empty());
  CHECK(of_many == (Runs{{0, 16}, {16, 24}, {0, 8}, {8, 13}, {13, 18}, {18, 20}, {20, 22},
                         {22, 23}, {23, 24}}));
  while (pool.run_some()) {
  }
  CHECK(of_other == (Runs{{0, 1}, {1, 2}, {2, 3}}));
  CHECK_EQ(pool.queued(), 0);
  // The same for jobs that are pushed one after the other, if they are parts of one piece of work.
  of_many.clear();
  for (Noting& job : many) pool.push(&job, 24, Turn::kLast, true);
  CHECK(pool.run_some());
  CHECK(of_many == (Runs{{0, 12}}));
  while (pool.run_some()) {
  }
  for (Gate& gate : gates) gate.open = true;
  for (Gate& gate : gates) CHECK(pool.help(gate.left, kNever));
}

TEST(pool_hands_out_every_part_of_an_offer_once) {
  struct Counting : Job {
    void run(int64_t first, int64_t last) noexcept override {
      for (int64_t part = first; part < last; ++part) ++runs[part];
      *left -= last - first;
    }
    std::atomic<int64_t>* left;
    std::vector<std::atomic<int>> runs;
  };
  for (const int threads : {1, 2, 3, 7}) {
    Offer offers[2];
    std::vector<Counting> jobs[2] = {std::vector<Counting>(5), std::vector<Counting>(3)};
    std::atomic<int64_t> left[2] = {{0}, {0}};
    Pool pool(threads);
    for (int round = 0; round < 300; ++round) {
      // Two who offer at the same time, again and again in the same memory.
      const auto offer = [&](int which) {
        Offer& offered = offers[which];
        offered.clear(static_cast<int64_t>(jobs[which].size()));
        int64_t total = 0;
        for (size_t i = 0; i < jobs[which].size(); ++i) {
          const int64_t parts = 1 + (7 * round + 13 * static_cast<int64_t>(i)) % 90;
          Counting& job = jobs[which][i];
          job.left = &left[which];
          job.runs = std::vector<std::atomic<int>>(parts);
          offered.add(&job, parts);
          total += parts;
        }
        left[which] = total;
        pool.push_all(&offered);
        CHECK(pool.help(left[which], kNever));
        CHECK_EQ(left[which], 0);
        for (const Counting& job : jobs[which]) {
          for (const auto& runs : job.runs) CHECK_EQ(runs, 1);
        }
      };
      std::thread beside([&] { offer(1); });
      offer(0);
      beside.join();
    }
  }
}

TEST(pool_queues_the_parts_behind_those_that_were_begun) {
  Pool pool(1);
  for (const Turn turn : {Turn::kLast, Turn::kNext}) {
    for (const bool behind_another : {false, true}) {
      CountingJob other(&pool, 3);
      CountingJob job(&pool, 5);
      if (behind_another) pool.push(&other, 3);
      pool.push(&job, 5, turn, true, 2);
      CHECK_EQ(pool.queued(), behind_another ? 6 : 3);
      while (pool.run_some()) {
      }
      CHECK_EQ(pool.queued(), 0);
      CHECK_EQ(other.left, behind_another ? 0 : 3);
      CHECK_EQ(job.left, 2);
      for (int i = 0; i < 5; ++i) CHECK_EQ(job.runs[i], i < 2 ? 0 : 1);
      job.run(0, 2);
      CHECK(job.each_once());
    }
  }
}
