// Work in parts that any thread may run.

#ifndef FLUXION_JOB_H_
#define FLUXION_JOB_H_

#include <cstddef>
#include <cstdint>

namespace fluxion {

// Lines of memory that cores hand to each other. What many threads write lies on one of its own, or
// each of them waits for what the others look at.
constexpr size_t kLineBytes = 64;

// Work in `parts` independent parts, begun in order.
class Job {
 public:
  virtual ~Job() = default;
  // Runs parts [first, last). The job may be pushed again, or cease to exist, once all have run.
  virtual void run(int64_t first, int64_t last) noexcept = 0;

 private:
  friend class Pool;
  Job* next_ = nullptr;
  int64_t parts_ = 0;
  int64_t next_part_ = 0;      // Where it is not the first in the queue; see Pool::head_part_.
  bool one_of_many_ = false;   // Pushed with others, as parts of one piece of work.
};

}  // namespace fluxion

#endif  // FLUXION_JOB_H_
