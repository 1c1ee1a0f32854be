#include "sim/ledger.h"

#include <algorithm>
#include <iterator>
#include <mutex>

#include "sim/control.h"
#include "sim/stream.h"

namespace cuda_sim {
namespace detail {
namespace {

struct Ledger {
  std::vector<Entry> entries;
  std::size_t launches_from = 0, waits_from = 0;  // where counting starts
};

Ledger& kept() {
  static Ledger& result = *new Ledger;
  return result;
}

std::int64_t count(Kind kind, std::size_t from) {
  const std::lock_guard lock(runtime_mutex());
  const auto& entries = kept().entries;
  return std::count_if(entries.begin() + static_cast<std::ptrdiff_t>(from), entries.end(),
                       [kind](const Entry& entry) { return entry.kind == kind; });
}

void count_from_here(std::size_t& from) {
  const std::lock_guard lock(runtime_mutex());
  from = kept().entries.size();
}

}  // namespace

void record(const Entry& entry) { kept().entries.push_back(entry); }

}  // namespace detail

std::vector<Entry> ledger() {
  const std::lock_guard lock(detail::runtime_mutex());
  return detail::kept().entries;
}

void reset_ledger() {
  const std::lock_guard lock(detail::runtime_mutex());
  detail::kept() = {};
}

Sum sum_if(const std::function<bool(const Entry&)>& counts) {
  Sum result;
  for (const Entry& entry : ledger()) {
    if (!counts(entry)) continue;
    ++result.calls;
    result.flops += entry.flops;
    result.bytes += entry.bytes;
  }
  return result;
}

std::int64_t launches() { return detail::count(Kind::launch, detail::kept().launches_from); }
void reset_launches() { detail::count_from_here(detail::kept().launches_from); }
std::int64_t synchronizations() { return detail::count(Kind::wait, detail::kept().waits_from); }
void reset_synchronizations() { detail::count_from_here(detail::kept().waits_from); }

}  // namespace cuda_sim
