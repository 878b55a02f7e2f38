// Parts of several jobs, cut into shares before anyone takes some.
//
// The first parts of a layer are wanted by all threads at the same moment. From a queue they would be
// taken one after the other, each taker waiting for a lock and for the memory behind it; of an offer
// the next share is taken by one addition. Shares become smaller: a round of them, one for each thread,
// is two thirds of what is left (factoring: Hummel, Schonberg and Flynn, 1992), so that few are taken
// and all threads end at about the same time.
//
// Ownership: whoever offers keeps the jobs until their last parts have run, and the offer itself for as
// long as the pool, because a thread may look at an offer that it no longer finds anything in.
// Threads: one at a time offers, and only when all that was offered before has run; any thread takes.

#ifndef FLUXION_OFFER_H_
#define FLUXION_OFFER_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "job.h"

namespace fluxion {

class Offer {
 public:
  // While nothing is offered: forgets all jobs, and makes room for so many. May throw std::bad_alloc.
  void clear(int64_t jobs) {
    jobs_.clear();
    jobs_.reserve(jobs);
  }

  // No more than there is room for, each of at least one part.
  void add(Job* job, int64_t parts) { jobs_.push_back({job, total() + parts}); }

  int64_t jobs() const { return static_cast<int64_t>(jobs_.size()); }
  Job* job(int64_t i) const { return jobs_[i].job; }
  int64_t parts(int64_t i) const { return jobs_[i].end - (i == 0 ? 0 : jobs_[i - 1].end); }

  // Lets `sharers` threads take shares from now on.
  void open(int64_t sharers) {
    sharers_ = sharers;
    state_.store(static_cast<uint64_t>(count_shares()) << 32, std::memory_order_release);
  }

  // Shares that nobody has taken yet.
  int64_t left() const {
    const uint64_t state = state_.load(std::memory_order_relaxed);
    return std::max<int64_t>(0, shares(state) - taken(state));
  }

  // Takes a share; returns false if none is left. `last` tells that it was the last.
  bool take(int64_t* first, int64_t* end, bool* last) {
    if (left() == 0) return false;
    // What was offered lies before the number of shares, so they are read together: whoever comes too
    // late must not take what is offered next for what it came for.
    const uint64_t state = state_.fetch_add(1, std::memory_order_acquire);
    if (taken(state) >= shares(state)) return false;
    find_share(taken(state), first, end);
    *last = taken(state) + 1 == shares(state);
    return true;
  }

  // Runs parts [first, end) of a share that was taken. Behind it the offer may be another one.
  void run(int64_t first, int64_t end) {
    const auto ends_behind = [](int64_t part, const Piece& piece) { return part < piece.end; };
    auto piece = std::upper_bound(jobs_.begin(), jobs_.end(), first, ends_behind);
    while (true) {
      const int64_t begin = piece == jobs_.begin() ? 0 : (piece - 1)->end;
      const int64_t stop = std::min(piece->end, end);
      const bool more = stop < end;
      piece->job->run(first - begin, stop - begin);
      if (!more) return;
      first = stop;
      ++piece;
    }
  }

 private:
  struct Piece {
    Job* job;
    int64_t end;  // Of its parts among those of all jobs.
  };

  int64_t total() const { return jobs_.empty() ? 0 : jobs_.back().end; }
  static int64_t shares(uint64_t state) { return static_cast<int64_t>(state >> 32); }
  static int64_t taken(uint64_t state) { return static_cast<int64_t>(state & 0xffffffffu); }

  // Parts of each share of a round.
  int64_t share_of(int64_t left) const {
    return std::max<int64_t>(1, 2 * left / (3 * sharers_));
  }

  int64_t count_shares() const {
    int64_t count = 0;
    int64_t left = total();
    for (; share_of(left) > 1; left -= sharers_ * share_of(left)) count += sharers_;
    return count + left;
  }

  void find_share(int64_t index, int64_t* first, int64_t* end) const {
    int64_t begin = 0;
    int64_t size = share_of(total());
    while (size > 1 && index >= sharers_) {
      index -= sharers_;
      begin += sharers_ * size;
      size = share_of(total() - begin);
    }
    *first = begin + index * size;
    *end = *first + size;
  }

  std::vector<Piece> jobs_;
  int64_t sharers_ = 1;
  // The number of shares, and in the lower half how many were asked for.
  alignas(kLineBytes) std::atomic<uint64_t> state_{0};
};

}  // namespace fluxion

#endif  // FLUXION_OFFER_H_
