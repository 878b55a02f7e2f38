// The CPUs that the process may run on, and those that the pool's threads are given.

#ifndef FLUXION_CPUS_H_
#define FLUXION_CPUS_H_

#include <string>
#include <vector>

namespace fluxion {

// In ascending order; the CPUs that the calling thread may run on.
std::vector<int> allowed_cpus();

// The CPUs of a list such as "0-3,8", or none if the text is not one.
std::vector<int> parse_cpus(const char* text);

// A list that parse_cpus reads.
std::string format_cpus(const std::vector<int>& cpus);

// Those of FLUXION_CPUS if it names nothing but allowed CPUs, otherwise none.
std::vector<int> wanted_cpus();

// How many CPUs the limits of control groups let the process keep busy, rounded up; the largest
// number there is without a limit. `folder` is where the groups are found and `membership` tells
// which is the process's own.
long cpu_quota(const char* folder = "/sys/fs/cgroup", const char* membership = "/proc/self/cgroup");

// Confines the calling thread; does nothing without a CPU or where the system refuses.
void run_on(const std::vector<int>& cpus);

}  // namespace fluxion

#endif  // FLUXION_CPUS_H_
